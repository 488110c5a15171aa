"""Offline, every image is classified once, whatever stops the command and whatever lies among the images."""

import csv
import dataclasses
import io
import json
import os

import commands
import numpy as np
import pytest
import services
from PIL import Image

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.serving import offline
from sdpoint_jax.serving.predictor import Prediction, Predictor
from sdpoint_jax.storage import artefact

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra predict")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 23 images in two folders."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for index in range(23):
        path = folder / f"{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (9 + index, 12), np.uint8)).save(path)
    return folder


def rows_of(output):
    return [row for path in sorted(output.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def predict(swept, images, output, *flags):
    return [
        "predict",
        swept.folder / "artefact",
        f"--input={images}",
        f"--output={output}",
        "--part-size=5",
        "--batch-size=4",
        *flags,
    ]


def test_each_image_gets_its_class(swept, images, tmp_path, capsys):
    commands.run(*predict(swept, images, tmp_path / "out", "--instance=p01_r0.50"))
    out = capsys.readouterr().out
    assert "runtime: xla\n" in out and "classified 23 images on p01_r0.50: " in out
    rows, predictor = rows_of(tmp_path / "out"), Predictor.load(swept.folder / "artefact")
    paths = sorted(map(str, images.rglob("*.png")))
    assert [row["path"] for row in rows] == paths
    probabilities = predictor.predict_probabilities(paths, instance="p01_r0.50")
    assert [row["label"] for row in rows] == probabilities.argmax(1).tolist()
    np.testing.assert_allclose([row["probability"] for row in rows], probabilities.max(1), rtol=1e-4)
    assert {row["instance"] for row in rows} == {"p01_r0.50"} and {row["error"] for row in rows} == {None}


def test_a_command_that_was_stopped_goes_on_with_what_is_missing(swept, images, tmp_path, monkeypatch, capsys):
    commands.run(*predict(swept, images, tmp_path / "whole", "--max-macs=1e9"))
    write, written = offline.files.write_atomically, []

    def stopped(path, content):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(offline.files, "write_atomically", stopped)
        commands.run(*predict(swept, images, tmp_path / "out", "--max-macs=1e9"), code=75)
    assert written == ["part-000000.parquet", "part-000001.parquet"]
    capsys.readouterr()
    commands.run(*predict(swept, images, tmp_path / "out", "--max-macs=1e9"))
    assert "(10 of them before)" in capsys.readouterr().out
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    monkeypatch.delattr(Predictor, "compile")  # With nothing missing, nothing is prepared either.
    commands.run(*predict(swept, images, tmp_path / "out", "--max-macs=1e9"))
    assert "(23 of them before)" in capsys.readouterr().out


def test_other_results_in_the_folder_are_kept(swept, images, tmp_path, capsys):
    commands.run(*predict(swept, images, tmp_path, "--instance=full"))
    before = rows_of(tmp_path)
    message = commands.error_of(capsys, *predict(swept, images, tmp_path, "--instance=p01_r0.50"))
    assert f"{tmp_path}: holds results of another instance; give another --output" in message
    assert rows_of(tmp_path) == before


def test_a_bad_image_is_named_or_left_out(swept, images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in "abcdef":
        (tmp_path / "in" / f"{name}.png").write_bytes(next(images.rglob("*.png")).read_bytes())
    (tmp_path / "in" / "f.png").write_text("no image")
    message = commands.error_of(capsys, *predict(swept, tmp_path / "in", tmp_path / "out", "--instance=full"))
    assert f"{tmp_path}/in/f.png: cannot be decoded" in message and "--on-bad-image=skip" in message
    commands.run(
        *predict(swept, tmp_path / "in", tmp_path / "out", "--instance=full", "--on-bad-image=skip")
    )  # Keeps what is done.
    assert "classified 6 images on full (5 of them before, 1 could not be read)" in capsys.readouterr().out
    *good, bad = rows_of(tmp_path / "out")
    assert all(row["label"] is not None for row in good) and bad["label"] is None and "not an image" in bad["error"]
    assert "f.png: cannot be" in commands.error_of(
        capsys, *predict(swept, tmp_path / "in", tmp_path / "out", "--instance=full")
    )


def test_without_an_output_a_line_is_printed_for_each_class(swept, images, tmp_path, capsys):
    pictures = sorted(images.rglob("*.png"))[:2]
    for name, picture in zip(["a.png", "b\n.png"], pictures, strict=True):
        (tmp_path / name).write_bytes(picture.read_bytes())
    flags = ["--top=2", "--instance=full", "--batch-size=1"]
    commands.run("predict", swept.folder / "artefact", *flags, tmp_path / "a.png", tmp_path / "b\n.png")
    captured = capsys.readouterr()
    predictor = Predictor.load(swept.folder / "artefact")
    assert captured.out.splitlines() == [
        f"{tmp_path}/{name}\t{found.class_name}\t{found.probability:.4f}"
        for name, classes in zip(["a.png", r"b\n.png"], predictor.predict_classes(pictures, top=2, instance="full"))
        for found in classes
    ]
    assert "classified 2 images on full" in captured.err
    (tmp_path / "c.png").write_text("no image")
    commands.run("predict", swept.folder / "artefact", tmp_path, "--on-bad-image=skip", "--batch-size=1")
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2 and f"{tmp_path}/c.png: cannot be decoded" in captured.err
    assert "no input" in commands.error_of(capsys, "predict", swept.folder / "artefact")


def test_a_single_file_of_results_is_written_by_its_ending(swept, images, tmp_path, capsys, monkeypatch):
    commands.run(*predict(swept, images, tmp_path / "folder", "--instance=full", "--top=2"))
    expected = rows_of(tmp_path / "folder")
    assert len(expected) == 46 and [row["rank"] for row in expected[:4]] == [1, 2, 1, 2]
    monkeypatch.setattr(offline, "classify", lambda *_, **__: pytest.fail("the parts are there"))
    for ending in ("parquet", "csv", "jsonl"):
        output = tmp_path / f"results.{ending}"
        (tmp_path / "folder").rename(tmp_path / f"{output.name}.parts")  # As if the command had been stopped.
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / f"{output.name}.parts").iterdir():
            (tmp_path / "folder" / path.name).write_bytes(path.read_bytes())
        offline.files.temporary_name(path).touch()  # Of a command that was killed.
        commands.run(*predict(swept, images, output, "--instance=full", "--top=2"))
        assert f"classified 23 images on full (23 of them before): {output}" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.glob("*.parts")) == []
    assert parquet.read_table(tmp_path / "results.parquet").to_pylist() == expected
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    cells = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    for row, line, cell in zip(expected, lines, cells, strict=True):
        assert line == row | {"probability": pytest.approx(row["probability"], abs=1e-6)}
        assert {key: "" if value is None else str(value) for key, value in line.items()} == cell
    before = output.read_bytes()
    assert "is there already" in commands.error_of(
        capsys, *predict(swept, images, output, "--instance=full", "--top=2")
    )
    assert output.read_bytes() == before


def names_of(sources, exclude=()):
    found, passed_over = offline.list_images([str(source) for source in sources], exclude)
    return [image.name for image in found], passed_over


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_lists_paths(images, tmp_path, monkeypatch, ending):
    def write(column, values):
        path = tmp_path / f"list.{ending}"
        if ending == "parquet":
            parquet.write_table(pyarrow.table({column: values}), path)
        elif ending == "csv":
            path.write_text("".join(f"{value or ''},\n" for value in [column, *values]))
        else:
            path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
        return path

    import pyarrow

    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.png").touch()
    paths = [*sorted(map(str, images.rglob("*.png")))[::-1][:3], "beside.png", "nowhere.png"]
    assert names_of([write("path", paths * 2)]) == (paths * 2, [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, _ = offline.list_images([str(write("path", paths))])
    assert [image.file for image in found][3:] == [str(tmp_path / "beside.png"), "nowhere.png"]
    with pytest.raises(ValueError, match=f"list.{ending}: has no column 'path'; it has file"):
        names_of([write("file", paths)])
    with pytest.raises(ValueError, match=f"list.{ending}: row 1, (None|''): not a path"):
        names_of([write("path", ["a.png", None])])
    with pytest.raises(ValueError, match=f"list.{ending}: row 0, s3://b/a.png: s3:// addresses are not supported"):
        names_of([write("path", ["s3://b/a.png"])])
    (tmp_path / f"list.{ending}").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=f"list.{ending}: (not a list of images|has no column)"):
        names_of([tmp_path / f"list.{ending}"])


def test_a_folder_is_searched_as_people_have_them(tmp_path):
    photos = tmp_path / "photos"
    for name in (
        "a.png",
        "sub/b.JPG",
        ".hidden/c.png",
        ".d.png",
        "sub/notes.txt",
        "no_ending",
        "text",
        "results/e.png",
    ):
        path = photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(services.encode(services.PICTURE) if name == "no_ending" else b"text")
    (photos / "sub" / "loop").symlink_to(photos)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "f.png").touch()
    (photos / "linked").symlink_to(tmp_path / "other")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(photos / "pipe.png")
    os.symlink("/dev/zero", photos / "device.png")
    found, passed_over = names_of([photos], exclude=[photos / "results", photos / "missing"])
    assert found == [f"{photos}/{name}" for name in ("a.png", "linked/f.png", "no_ending", "sub/b.JPG")]
    assert passed_over == [
        f"{photos}/{name}" for name in ("device.png", "gone.png", "pipe.png", "sub/notes.txt", "text")
    ]
    assert names_of([photos / "text", photos / "linked"])[0] == [f"{photos}/text", f"{photos}/linked/f.png"]
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder; give images, folders"):
        names_of([photos, "nowhere"])
    with pytest.raises(ValueError, match=r"empty: holds no images \(.jpg .*\), but 1 other files, as .*notes.txt"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "notes.txt").touch()
        names_of([tmp_path / "empty"])


class Stub:
    """Says of each image which row and column it begins with."""

    image_shape, resize = (8, 8, 1), None

    def predict_classes(self, images, *, top, instance):
        return [[Prediction(int(image[0, 0, 0]), str(image[0, 0, 0]), 1.0)] * top for image in images]


@pytest.fixture(scope="module")
def swept_artefact(swept):
    return artefact.load(swept.folder / "artefact")


@pytest.fixture
def photos(tmp_path):
    """A folder of 7 images, the label of each being its number."""
    for index in range(7):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    return tmp_path / "photos"


def classify(swept_artefact, photos, output, **settings):
    """Classifies what is missing; returns the numbers of the missing and the damaged parts before."""
    found, _ = offline.list_images([str(photos)])
    plan = offline.make_plan(swept_artefact, FULL_RESOLUTION, found, part_size=3, **settings)
    missing, damaged, _ = offline.find_progress(plan, output)
    output.mkdir(parents=True, exist_ok=True)
    list(offline.run_parts(Stub(), plan, found, output, missing))
    assert [row["label"] for row in rows_of(output)] == list(range(7))
    return missing, damaged


def test_results_are_read_as_one_table(swept_artefact, photos):
    import pyarrow.dataset

    classify(swept_artefact, photos, photos / "results")
    table = pyarrow.dataset.dataset(photos / "results").to_table()
    assert table["path"].to_pylist() == [f"{photos}/{index}.png" for index in range(7)]
    assert parquet.read_table(photos / "results").to_pylist() == rows_of(photos / "results")
    assert {path.suffix for path in (photos / "results").iterdir()} == {".parquet"}
    assert classify(swept_artefact, photos, photos / "results") == ([], [])


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "altered", "of another number"])
def test_a_part_that_was_damaged_is_classified_again(swept_artefact, photos, tmp_path, damage):
    output, part = tmp_path / "out", tmp_path / "out" / "part-000001.parquet"
    assert classify(swept_artefact, photos, output) == ([0, 1, 2], [])
    whole = part.read_bytes()
    altered = bytearray(whole)
    altered[whole.index(b"photos/3.png")] ^= 1  # Another letter, which only a checksum tells.
    contents = {"empty": b"", "cut": whole[:100], "altered": bytes(altered)}
    contents["of another number"] = (output / "part-000000.parquet").read_bytes()
    part.unlink() if damage == "missing" else part.write_bytes(contents[damage])
    assert classify(swept_artefact, photos, output) == ([1], [1] if damage in ("empty", "cut", "altered") else [])
    assert part.read_bytes() == whole


def test_measurements_do_not_make_another_plan_and_all_else_does(swept_artefact, photos, tmp_path):
    classify(swept_artefact, photos, tmp_path / "out")
    assert classify(services.with_latencies(swept_artefact), photos, tmp_path / "out") == ([], [])
    renamed = dataclasses.replace(swept_artefact, class_names=tuple("abcdefghij"))
    with pytest.raises(ValueError, match="out: holds results of another artefact; give another --output"):
        classify(renamed, photos, tmp_path / "out")
    with pytest.raises(ValueError, match="out: holds results of another --top; give another"):
        classify(swept_artefact, photos, tmp_path / "out", top=2)
    Image.new("L", (8, 8), 3).save(photos / "3.png", compress_level=0)
    with pytest.raises(ValueError, match="holds results of another list of images, or of images that were changed; "):
        classify(swept_artefact, photos, tmp_path / "out")


@pytest.mark.parametrize("content", [b"notes", "table"])
def test_files_of_others_are_left_alone(swept_artefact, photos, tmp_path, content):
    import pyarrow

    path = tmp_path / "out" / "part-000001.parquet"
    path.parent.mkdir()
    path.write_bytes(b"notes") if content == b"notes" else parquet.write_table(pyarrow.table({"x": [1]}), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="part-000001.parquet: not a result of .*; give another --output"):
        classify(swept_artefact, photos, tmp_path / "out")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(ValueError, match="part-000001.parquet: is a file; give a folder, or a file that ends in"):
        classify(swept_artefact, photos, path)


def test_a_name_that_is_not_utf_8_is_escaped(swept_artefact, photos, tmp_path):
    os.rename(photos / "6.png", os.fsencode(photos) + b"/caf\xe9.png")
    os.rename(photos / "5.png", photos / "5\nä.png")
    classify(swept_artefact, photos, tmp_path / "out")
    assert [row["path"] for row in rows_of(tmp_path / "out")][5:] == [f"{photos}/5\nä.png", rf"{photos}/caf\xe9.png"]
    with open(os.fsencode(photos) + b"/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    with pytest.raises(ValueError, match=r"/caf\\xe9.png: cannot be decoded"):
        classify(swept_artefact, photos, tmp_path / "again")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=nowhere"], "nowhere: no such file or folder"),
        (["--top=0"], "top 0: valid are 1 to 10, the number of classes"),
        (["--top=11"], "top 11: valid are 1 to 10"),
        (
            ["--output=results.json"],
            "--output=results.json: valid endings are .parquet, .csv, .jsonl; a folder has none",
        ),
        (["--part-size=0"], "part_size 0: at least 1"),
        (["--batch-size=0"], "--batch-size=0: at least 1"),
        (["--on-bad-image=hide"], "--on-bad-image=hide: valid are error, skip"),
        (["--instance=p02_r0.25"], "p02_r0.25"),
        (["--instance=full", "--max-macs=5"], "--instance=full: give a budget or an instance"),
        (["--max-macs=1"], "the cheapest instance"),
    ],
)
def test_bad_input_is_one_line(swept, images, tmp_path, capsys, flags, message):
    assert message in commands.error_of(capsys, *predict(swept, images, tmp_path / "out", *flags))
    assert not list(tmp_path.glob("out/part-*"))
