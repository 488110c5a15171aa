"""Offline, every image is classified once, whatever stops the command."""

import commands
import numpy as np
import pytest
from PIL import Image

from sdpoint_jax.serving import offline
from sdpoint_jax.serving.predictor import Predictor

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
    write, written = offline.write_part, []

    def stopped(path, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "write_part", stopped)
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
    (tmp_path / "in" / "a.png").write_bytes(next(images.rglob("*.png")).read_bytes())
    (tmp_path / "in" / "b.png").write_text("no image")
    message = commands.error_of(capsys, *predict(swept, tmp_path / "in", tmp_path / "out"))
    assert f"{tmp_path}/in/b.png: cannot be decoded" in message
    commands.run(*predict(swept, tmp_path / "in", tmp_path / "skipped", "--on-bad-image=skip"))
    good, bad = rows_of(tmp_path / "skipped")
    assert good["label"] is not None and bad["label"] is None and "not an image" in bad["error"]


def test_a_parquet_file_lists_paths(swept, images, tmp_path, capsys):
    import pyarrow

    paths = sorted(map(str, images.rglob("*.png")))[::-1][:3]
    parquet.write_table(pyarrow.table({"path": paths}), tmp_path / "list.parquet")
    commands.run(*predict(swept, tmp_path / "list.parquet", tmp_path / "out"))
    assert [row["path"] for row in rows_of(tmp_path / "out")] == paths
    parquet.write_table(pyarrow.table({"file": paths}), tmp_path / "other.parquet")
    assert "has no column 'path'; it has file" in commands.error_of(
        capsys, *predict(swept, tmp_path / "other.parquet", tmp_path / "none")
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input=nowhere"], "nowhere: no such folder"),
        (["--part-size=0"], "part_size 0: at least 1"),
        (["--batch-size=0"], "--batch-size=0: at least 1"),
        (["--on-bad-image=hide"], "on_bad_image 'hide': valid are error, skip"),
        (["--instance=p02_r0.25"], "p02_r0.25"),
        (["--instance=full", "--max-macs=5"], "--instance=full: give a budget or an instance"),
        (["--max-macs=1"], "the cheapest instance"),
    ],
)
def test_bad_input_is_one_line(swept, images, tmp_path, capsys, flags, message):
    assert message in commands.error_of(capsys, *predict(swept, images, tmp_path / "out", *flags))
    assert not list(tmp_path.glob("out/part-*"))
