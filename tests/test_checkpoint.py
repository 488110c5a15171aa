import pathlib
import random
import shutil

import chex
import numpy as np
import pytest

from sdpoint_jax import checkpoint

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


# tensorstore goes on reading other arrays after the first that fails, and finds its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["delete", "empty", "truncate", "flip", "flip", "flip"])
def test_damage_to_any_file_is_an_error_or_changes_nothing(saved, tmp_path, kind):
    rng = random.Random(kind)
    refused = 0
    for file in files_of(saved):
        if not file.stat().st_size:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damage(kind, copy / file.relative_to(saved), rng)
        try:
            arrays, record = checkpoint.load(copy)
        except checkpoint.CheckpointError as error:
            refused += 1
            assert str(copy) in str(error)
        else:
            chex.assert_trees_all_equal(arrays, ARRAYS)
            assert record == RECORD
        shutil.rmtree(copy)
    assert refused >= 2


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
