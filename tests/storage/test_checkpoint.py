import json
import os
import pathlib
import random
import shutil
import zlib

import chex
import numpy as np
import pytest

from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage import checkpoint

ARRAYS = {
    "params": {"dense": {"kernel": np.arange(600, dtype=np.float32).reshape(20, 30), "bias": np.zeros(3, np.float32)}},
    "opt_state": {"0": {}, "1": {"trace": np.ones((7, 2), np.float32)}},
    "step": np.int32(7),
}
RECORD = {"config": {"learning_rate": 0.1, "name": "x"}, "classes": ["a", "b"]}


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "one", ARRAYS, RECORD)
    return tmp_path / "one"


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_what_was_saved_is_loaded(saved):
    arrays, record = checkpoint.load(saved)
    chex.assert_trees_all_equal(arrays, ARRAYS)
    assert arrays["opt_state"]["0"] == {} and arrays["step"].dtype == np.int32
    assert record == RECORD


def test_saving_again_replaces_and_leaves_nothing_behind(saved):
    checkpoint.save(saved, {"params": {"x": np.zeros(1)}}, {"second": True})
    assert checkpoint.load(saved)[1] == {"second": True}
    assert [path.name for path in saved.parent.iterdir()] == ["one"]


def damage(kind, file, rng):
    content = bytearray(file.read_bytes())
    assert content or kind == "delete", file
    if kind == "delete":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


@pytest.mark.parametrize("kind", ["delete", "empty", "truncate", *(f"flip {number}" for number in range(12))])
def test_damage_to_any_file_is_an_error(saved, tmp_path, kind):
    rng = random.Random(kind)
    for file in files_of(saved):
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damage(kind, copy / file.relative_to(saved), rng)
        with pytest.raises(checkpoint.CheckpointError, match=f"^{copy}: .*(damaged|not a sound)") as error:
            checkpoint.load(copy)
        name = file.relative_to(saved).as_posix()
        assert name == "files.json" or repr(name) in str(error.value)
        shutil.rmtree(copy)


def test_arrays_are_verified_by_themselves_too(saved, monkeypatch):
    arrays, record = checkpoint.load(saved)
    sums = checkpoint._checksums(ARRAYS)
    arrays["params"]["dense"]["kernel"][3, 4] += 1
    with monkeypatch.context() as patch:  # A fault after the checksums were taken.
        patch.setattr(checkpoint, "_checksums", lambda _: sums)
        checkpoint.save(saved, arrays, record)
    with pytest.raises(checkpoint.CheckpointError, match="checksum mismatch in params/dense/kernel$"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "arrays/../../outside"])
def test_a_list_of_files_cannot_leave_the_folder(saved, name):
    (saved.parent / "outside").write_text("x")
    files = json.loads((saved / "files.json").read_text())
    (saved / "files.json").write_text(json.dumps(files | {name: [1, zlib.crc32(b"x")]}))
    with pytest.raises(checkpoint.CheckpointError, match=f"'{name}' lies outside of the folder"):
        checkpoint.load(saved)


def link_as_a_hub(folder, blobs):
    """Move all files of a folder to `blobs`, and leave links to them, as the caches of hubs do."""
    blobs.mkdir()
    for number, file in enumerate(files_of(folder)):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))


def test_a_checkpoint_of_links_loads_and_is_replaced_without_touching_what_they_point_to(saved, tmp_path):
    link_as_a_hub(saved, tmp_path / "blobs")
    (tmp_path / "link").symlink_to(saved)
    blobs = {file.name: file.read_bytes() for file in files_of(tmp_path / "blobs")}
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "link")[0], ARRAYS)
    checkpoint.save(tmp_path / "link", ARRAYS, {"second": True})
    assert checkpoint.load(saved)[1] == {"second": True} and (tmp_path / "link").is_symlink()
    assert {file.name: file.read_bytes() for file in files_of(tmp_path / "blobs")} == blobs
    (saved / "record" / "metadata").unlink()
    (saved / "record" / "metadata").symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(checkpoint.CheckpointError, match=f"^{saved}: damaged: 'record/metadata' has"):
        checkpoint.load(saved)


def test_a_damaged_artefact_makes_no_predictor(swept, tmp_path):
    shutil.copytree(swept.folder / "artefact", tmp_path / "artefact")
    Predictor.load(tmp_path / "artefact")
    for file in files_of(tmp_path / "artefact"):
        content = file.read_bytes()
        damage("flip", file, random.Random(file.name))
        with pytest.raises(checkpoint.CheckpointError, match=f"^{tmp_path}/artefact: damaged: "):
            Predictor.load(tmp_path / "artefact")
        file.write_bytes(content)


def leave(folder, name, kind):
    """Leave the temporary folder of a process that was killed while it replaced or removed the folder `name`."""
    temporary = folder / f".{name}.{'0123456789abcdef'}.sdpoint_jax"
    temporary.mkdir()
    (temporary / "sdpoint_jax.lock").touch()
    return temporary / kind


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(saved):
    saved.rename(leave(saved.parent, "one", "old"))
    assert checkpoint.load(saved)[1] == RECORD
    checkpoint.save(saved, ARRAYS, {"second": True})
    assert checkpoint.load(saved)[1] == {"second": True}
    assert [path.name for path in saved.parent.iterdir()] == ["one"]


def test_the_list_of_somebody_elses_files_makes_no_checkpoint(tmp_path):
    for content in ("{}", '{"a.jpg": [1, 2]}', "[]", "x"):
        (tmp_path / "files.json").write_text(content)
        with pytest.raises(ValueError, match=f"^{tmp_path}: exists and is not a checkpoint, so it is left as it is"):
            checkpoint.save(tmp_path, ARRAYS, RECORD)
        assert (tmp_path / "files.json").read_text() == content


def test_a_list_that_was_tampered_with_removes_nothing_elsewhere(saved):
    outside = saved.parent / "outside"
    outside.write_text("precious")
    (saved / "link").symlink_to(outside)
    listed = json.loads((saved / "files.json").read_text())
    (saved / "files.json").write_text(json.dumps(listed | {"../outside": [8, 0], str(outside): [8, 0], "link": [8, 0]}))
    checkpoint.save(saved, ARRAYS, RECORD)
    assert outside.read_text() == "precious"
    assert checkpoint.load(saved)[1] == RECORD


def test_a_flipped_byte_of_an_array_is_found(saved):
    largest = max(files_of(saved / "arrays"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=str(saved)):
        checkpoint.load(saved)


def write_run(directory, steps):
    checkpoints = checkpoint.RunCheckpoints(directory, keep=len(steps))
    for step in steps:
        checkpoints.save(step, ARRAYS | {"step": np.int32(step)}, RECORD | {"step": step})
    checkpoints.close()


def test_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = checkpoint.RunCheckpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, ARRAYS, RECORD)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30"]


def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_named(tmp_path):
    write_run(tmp_path, (10, 20, 30))
    (tmp_path / "30" / "record" / "metadata").write_text("{")
    shutil.rmtree(tmp_path / "20")
    (tmp_path / "20").mkdir()
    (tmp_path / "40.orbax-checkpoint-tmp").mkdir()
    warnings = []
    step, arrays, record = checkpoint.newest(tmp_path, warn=warnings.append)
    assert step == record["step"] == arrays["step"] == 10
    assert [str(tmp_path / name) in warning for name, warning in zip(("30", "20"), warnings, strict=True)] == [
        True,
        True,
    ]


def test_what_damaged_checkpoints_a_run_finds_it_moves_aside(tmp_path):
    write_run(tmp_path, (10, 20, 30))
    (tmp_path / "20.damaged").mkdir()
    checkpoints = checkpoint.RunCheckpoints(tmp_path, keep=3, start_step=10)
    checkpoints.save(20, ARRAYS, RECORD)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "20.damaged", "20.damaged1", "30.damaged"]


def test_a_folder_of_somebody_else_with_a_number_as_its_name_is_refused(tmp_path):
    write_run(tmp_path, (10,))
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "note").write_text("dear")
    with pytest.raises(ValueError, match=f"^{tmp_path}/2024: was not written by this package"):
        checkpoint.RunCheckpoints(tmp_path, keep=1, start_step=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2024"]


def test_the_best_checkpoints_are_kept_besides_the_newest(tmp_path):
    checkpoints = checkpoint.RunCheckpoints(tmp_path, keep=1, keep_best=2, score=lambda record: record.get("score"))
    for step, score in enumerate((0.5, 0.9, 0.9, 0.1, None, 0.2)):
        checkpoints.save(step, ARRAYS, RECORD | {"score": score})
    checkpoints.close()
    assert checkpoint.list_steps(tmp_path) == [5, 2, 1]


def test_leftovers_of_a_kill_are_cleared_when_the_run_goes_on(tmp_path):
    write_run(tmp_path, (10, 5))
    (tmp_path / "5").rename(leave(tmp_path, "5", "removed"))
    (leave(tmp_path, "20", "new.orbax-checkpoint-tmp") / "arrays").mkdir(parents=True)
    (tmp_path / "10").rename(leave(tmp_path, "10", "old"))
    assert checkpoint.newest(tmp_path)[0] == 10
    checkpoint.RunCheckpoints(tmp_path, keep=1, start_step=10).close()
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_only_checkpoints_of_a_run_are_removed(tmp_path):
    write_run(tmp_path, (10, 20))
    for name in ("notes.writing", "notes.replaced", "2.deleting", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "note").write_text("precious")
    (tmp_path / "10" / "note").write_text("precious")
    checkpoints = checkpoint.RunCheckpoints(tmp_path, keep=1, start_step=20)
    checkpoints.save(30, ARRAYS, RECORD)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.rglob("note")) == ["note"] * 5
    assert [path.name for path in (tmp_path / "10").iterdir()] == ["note"] and not (tmp_path / "20").exists()


def test_without_a_sound_checkpoint_nothing_is_touched(tmp_path):
    write_run(tmp_path, (10, 20))
    for step in ("10", "20"):
        (tmp_path / step / "record" / "metadata").unlink()
    before = files_of(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="none of the 2 checkpoints is sound"):
        checkpoint.newest(tmp_path, warn=lambda _: None)
    assert files_of(tmp_path) == before


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


@pytest.mark.parametrize("path", ["missing", "."])
def test_what_is_no_checkpoint_is_named(tmp_path, path):
    with pytest.raises(checkpoint.CheckpointError, match=str(pathlib.Path(tmp_path, path))):
        checkpoint.load(tmp_path / path)


def test_equal_trees_have_equal_checksums():
    other = {"params": {"dense": dict(reversed(ARRAYS["params"]["dense"].items()))}}
    same = {"params": ARRAYS["params"]}
    assert checkpoint.checksum_tree(other) == checkpoint.checksum_tree(same)
    other["params"]["dense"]["bias"] = np.float32([0, 0, 1e-30])
    assert checkpoint.checksum_tree(other) != checkpoint.checksum_tree(same)
