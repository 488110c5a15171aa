"""Checkpoints: nested dicts of NumPy arrays and a JSON record beside them, written atomically and checksummed.

A run's checkpoints, imported weights and swept artefacts are all such folders, in orbax's format; `load` reads any
of them, in a notebook too. Loading never executes code. Orbax would load a flipped byte silently: the CRC-32 of
every array, and of the record itself, is verified.
"""

import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

CHECKPOINTS = "checkpoints"  # Of a run, in its workdir.
_CHECKSUMS = "crc32"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message names its path."""


def save(path: str | os.PathLike, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes a checkpoint at `path`, replacing what is there only once the new one is complete.

    Args:
        path: a folder.
        arrays: nested dict, with string keys, of arrays.
        record: what JSON can hold.
    """
    path = pathlib.Path(path).absolute()
    writing, replaced = path.with_name(f"{path.name}.writing"), _replaced(path)
    shutil.rmtree(writing, ignore_errors=True)
    with _checkpointer() as checkpointer:
        checkpointer.save(writing, _save_args(arrays, record))
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    writing.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def load(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies the checkpoint at `path`.

    Returns:
        (arrays, record) as saved: nested dicts of NumPy arrays, and what JSON held.

    Raises:
        CheckpointError: there is none, or it is damaged: a file is missing, truncated or altered.
    """
    path = pathlib.Path(path).absolute()
    if not path.exists() and _replaced(path).exists():
        path = _replaced(path)  # The process was killed between the two renames of `save`.
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = checkpointer.restore(path, args)
        arrays, record = restored["arrays"], restored["record"]
    except Exception as error:  # Damage surfaces as any of a dozen exception types of orbax, tensorstore and json.
        raise CheckpointError(f"{path}: not a sound checkpoint: {_first_line(error)}") from error
    _verify(path, arrays, record)
    return arrays, record["content"]


def _replaced(path):
    return path.with_name(f"{path.name}.replaced")


def _checkpointer():
    alone = _this_host_alone()
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _this_host_alone():
    """All that is saved is the same on all hosts: none needs to wait for another."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"host{index}"
    )


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _save_args(arrays, record):
    arrays = jax.tree.map(np.asarray, dict(arrays))
    sealed = {"content": record, _CHECKSUMS: {"record": _json_checksum(record), "arrays": _checksums(arrays)}}
    return ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(sealed))


def checksum_tree(arrays: Mapping[str, Any]) -> int:
    """One checksum of all the arrays of a nested dict, their names, types and shapes."""
    return _json_checksum(_checksums(arrays))


def _json_checksum(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checksums(arrays):
    flat = traverse_util.flatten_dict(arrays, sep="/")
    return {name: _checksum(np.asarray(value)) for name, value in flat.items()}


def _checksum(array):
    return zlib.crc32(np.ascontiguousarray(array), zlib.crc32(f"{array.dtype} {array.shape}".encode()))


def _verify(path, arrays, record):
    if not isinstance(record, dict) or not {"content", _CHECKSUMS} <= set(record):
        raise CheckpointError(f"{path}: not a checkpoint of this project: its record has no checksums")
    expected = record[_CHECKSUMS]
    if not isinstance(expected, dict) or _json_checksum(record["content"]) != expected.get("record"):
        raise CheckpointError(f"{path}: damaged: the checksum of its record does not match")
    found = _checksums(arrays)
    bad = sorted(
        name for name in found.keys() | expected["arrays"].keys() if found.get(name) != expected["arrays"].get(name)
    )
    if bad:
        raise CheckpointError(
            f"{path}: damaged: checksum mismatch in {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}"
        )


class RunCheckpoints:
    """Writes the checkpoints of a run, folders named by their step: in the background, on the main host alone."""

    def __init__(self, directory: str | os.PathLike, *, keep: int):
        """`keep`: how many of the newest to keep."""
        self._manager = None
        if jax.process_index() != 0:
            return
        directory = pathlib.Path(directory).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, multiprocessing_options=_this_host_alone()
        )
        self._manager = ocp.CheckpointManager(directory, options=options)

    def save(self, step: int, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Starts to save; returns when `arrays`, which are on the host, may change."""
        if self._manager:
            self._manager.save(step, args=_save_args(arrays, record), force=True)

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        if self._manager:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the threads."""
        if self._manager:
            self._manager.close()


def newest(directory: str | os.PathLike, warn=print) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The newest sound checkpoint of a run; `warn` hears of every damaged one that is newer.

    Returns:
        (step, arrays, record), or None where the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, none of which is sound.
    """
    directory = pathlib.Path(directory)
    steps = sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)
    for step in steps:
        try:
            return step, *load(directory / str(step))
        except CheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    if steps:
        raise CheckpointError(
            f"{directory.absolute()}: none of the {len(steps)} checkpoints is sound; nothing was changed"
        )
    return None


def load_newest(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays, record) of a checkpoint, or of the newest sound one of the run whose workdir is `path`.

    Raises:
        CheckpointError: there is none, or none that is sound.
    """
    runs = pathlib.Path(path) / CHECKPOINTS
    if not runs.is_dir():
        return load(path)
    found = newest(runs)
    if found is None:
        raise CheckpointError(f"{runs.absolute()}: holds no checkpoint yet")
    return found[1:]
