"""An export is whole or absent, says what is in it, and any altered byte of it is named."""

import errno
import importlib.util
import json
import re
import shutil
import sys

import commands
import numpy as np
import pytest
from interop import nets

from sdpoint_jax.choice.table import InstanceRow, Latency
from sdpoint_jax.evaluation.table import pareto_front
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.interop import bundle
from sdpoint_jax.storage import artefact

pytest.importorskip("flatbuffers")

CHEAP = SDPointInstance(2, 0.75)


@pytest.fixture(scope="module")
def found(swept):
    return artefact.load(swept.folder / "artefact")


@pytest.fixture(scope="module")
def whole(found, tmp_path_factory):
    """An export of two instances."""
    folder = tmp_path_factory.mktemp("export") / "whole"
    bundle.write(found, [FULL_RESOLUTION, CHEAP], folder)
    return folder


def load(folder):
    """The classifier of an export, by the loader that lies in it."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Classifier()


def test_the_manifest_has_all_that_an_application_needs(found, tmp_path):
    latency = Latency("cpu 2 threads", "xla", "float32", 8, 1.5, 2.0, 40, None, 3.0, {"jax": "0.10"})
    rows = [row.with_latency(latency) for row in found.rows]
    returned = bundle.write(found.with_rows(rows), [CHEAP], tmp_path / "exported")
    manifest = json.loads((tmp_path / "exported/manifest.json").read_text())
    assert manifest == json.loads(json.dumps(returned)) and manifest["format"] == 1
    (record,) = manifest["instances"]
    assert record.pop("files") == {"stablehlo": "p02_r0.75.stablehlo", "statistics": "p02_r0.75.npz"}
    assert InstanceRow.from_record(record) == next(row for row in rows if row.instance == CHEAP)
    assert manifest["class_names"] == list("0123456789")
    assert manifest["model"] == {"name": "wrn10_1", "dtype": "float32", "num_classes": 10}
    preprocessing = manifest["preprocessing"]
    assert (preprocessing["image_shape"], preprocessing["resize_to_cover"]) == ([8, 8, 1], [8, 8])
    assert (preprocessing["mean"], preprocessing["std"]) == (list(found.mean), list(found.std))
    assert {"jax", "flax", "numpy"} < manifest["versions"].keys()
    assert manifest["files"].keys() == {"load.py", "params.npz", "p02_r0.75.npz", "p02_r0.75.stablehlo"}


def test_a_byte_flipped_in_any_file_is_named(whole, tmp_path):
    rng = np.random.default_rng(0)
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 8
    for name in [name for name in names if name != "load.py"] * 3:
        shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "flipped")
        content = bytearray((whole / name).read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / "flipped" / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"flipped: damaged: .*{name}"):
            load(tmp_path / "flipped")


def test_an_altered_loader_and_a_missing_file_are_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    with (tmp_path / "copy/load.py").open("a") as file:
        file.write("#")
    with pytest.raises(ValueError, match="copy: damaged: load.py does not fit its checksum"):
        load(tmp_path / "copy")
    (tmp_path / "copy/load.py").write_bytes((whole / "load.py").read_bytes())
    (tmp_path / "copy/full.npz").unlink()
    with pytest.raises(OSError, match="full.npz"):
        load(tmp_path / "copy")


def test_an_export_of_links_is_loaded(whole, found, tmp_path):
    (tmp_path / "links").mkdir()
    for file in whole.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    images = nets.images_of(found, 2)
    assert load(tmp_path / "links").classify(images, "full").shape == (2, 10)


def test_the_loader_refuses_other_images_and_instances(whole, found):
    classifier, images = load(whole), nets.images_of(found, 2)
    assert nets.deviation(classifier.classify(images, "full"), nets.logits_of(found, images, FULL_RESOLUTION)) <= 1e-5
    with pytest.raises(ValueError, match=r"images float32 \[2, 8, 8, 1\]: needs uint8 \[B, 8, 8, 1\]"):
        classifier.classify(images.astype(np.float32), "full")
    with pytest.raises(ValueError, match="instance 'p01_r0.50': the folder has full, p02_r0.75"):
        classifier.classify(images, "p01_r0.50")


def test_an_export_is_replaced_and_anything_else_is_not(whole, found, tmp_path):
    path = tmp_path / "exported"
    path.mkdir()
    bundle.write(found, [FULL_RESOLUTION], path)  # It was empty.
    bundle.write(found, [CHEAP], path)
    assert not (path / "full.npz").exists() and (path / "p02_r0.75.npz").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_text("dear")
    (tmp_path / "photos/manifest.json").write_text('{"kind": "photos", "files": {}}')
    (tmp_path / "file").write_text("dear")
    for other in ("photos", "file"):
        with pytest.raises(ValueError, match=f"{other}: exists and is not an export"):
            bundle.write(found, [CHEAP], tmp_path / other)
    assert (tmp_path / "photos/1.jpg").read_text() == (tmp_path / "file").read_text() == "dear"


def test_an_export_that_fails_changes_nothing(found, tmp_path, monkeypatch):
    path = tmp_path / "exported"
    bundle.write(found, [CHEAP], path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    leftover = tmp_path / ".exported.0123456789abcdef.sdpoint_jax"  # As a process leaves it that was killed.
    (leftover / "new").mkdir(parents=True)
    (leftover / "sdpoint_jax.lock").touch()

    def fill_disk(folder, *_):
        assert (folder / "full.stablehlo").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle, "_write_manifest", fill_disk)
    with pytest.raises(OSError, match="exported: could not be written: No space left on device"):
        bundle.write(found, [FULL_RESOLUTION], path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]


def test_a_kill_between_the_renames_loses_nothing(whole, found, tmp_path, monkeypatch):
    leftover = tmp_path / ".exported.0123456789abcdef.sdpoint_jax"
    shutil.copytree(whole, leftover / "old")
    (leftover / "sdpoint_jax.lock").touch()
    monkeypatch.setattr(bundle, "_write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bundle.write(found, [CHEAP], tmp_path / "exported")
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]
    load(tmp_path / "exported")


def test_all_formats_lie_in_one_folder_under_one_manifest(found, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("safetensors")
    manifest = bundle.write(found, [CHEAP, CHEAP], tmp_path / "exported", formats=["onnx", "safetensors", "onnx"])
    (record,) = manifest["instances"]
    assert record["files"] == {
        "onnx": "p02_r0.75.onnx",
        "safetensors": "p02_r0.75/model.safetensors",
        "config": "p02_r0.75/config.json",
    }
    assert manifest["files"].keys() == {*record["files"].values(), "params.weights"}


@pytest.mark.parametrize("library, extra", [("flatbuffers", "export"), ("onnx", "onnx"), ("safetensors", "export")])
def test_a_missing_library_is_named_with_its_extra(swept, capsys, tmp_path, monkeypatch, library, extra):
    monkeypatch.setitem(sys.modules, library, None)
    name = "stablehlo" if library == "flatbuffers" else library
    error = commands.error_of(
        capsys, "export", swept.folder / "artefact", f"--output={tmp_path / 'o'}", f"--format={name}"
    )
    assert f"format {name}: needs {library}, pip install 'sdpoint_jax[{extra}]'" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--instances=full,p02_r0.60"], "instance p02_r0.60: .*not re-estimated; the artefact has full, p01_r0.50"),
        (["--instances=half"], "instance name 'half': valid are"),
        (["--format=tflite"], "format tflite: valid are stablehlo, onnx, safetensors"),
        (["--format="], "format : valid are stablehlo, onnx, safetensors"),
        (["--fold"], "fold: is of safetensors alone, not of stablehlo"),
    ],
)
def test_bad_input_is_one_line_that_names_it(swept, capsys, tmp_path, flags, message):
    output = f"--output={tmp_path / 'exported'}"
    error = commands.error_of(capsys, "export", swept.folder / "artefact", output, *flags)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())
    assert "nowhere: no such checkpoint" in commands.error_of(capsys, "export", tmp_path / "nowhere", output)


def test_the_command_exports_the_front_by_default_and_all_on_request(swept, capsys, tmp_path):
    path, output = swept.folder / "artefact", tmp_path / "exported"
    commands.run("export", path, f"--output={output}")
    names = [row["instance"] for row in json.loads((output / "manifest.json").read_text())["instances"]]
    assert names == [row.name for row in pareto_front(swept.rows)] and len(names) < len(swept.rows)
    commands.run("export", path, f"--output={output}", "--instances=all")
    names = [row["instance"] for row in json.loads((output / "manifest.json").read_text())["instances"]]
    assert names == [row.name for row in swept.rows]
    assert f"exported 7 instances of wrn10_1: {output}" in capsys.readouterr().out
