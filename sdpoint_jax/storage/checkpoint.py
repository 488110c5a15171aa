"""Checkpoints: nested dicts of NumPy arrays and a JSON record beside them, written atomically and checksummed.

A run's checkpoints, imported weights and swept artefacts are all such folders, in orbax's format; `load` reads any
of them, in a notebook too. Loading never executes code. Orbax would load a flipped byte silently, and damaged
metadata may ask it for any amount of memory: the size and CRC-32 of every file are verified before it reads, and
the CRC-32 of every array, and of the record, after.
"""

import concurrent.futures
import errno
import itertools
import json
import os
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from sdpoint_jax.paths import check_local
from sdpoint_jax.storage import files, folders

CHECKPOINTS = "checkpoints"  # Of a run, in its workdir.
WHAT = "a checkpoint"  # In messages.
FILES = "files.json"  # Size and CRC-32 of every other file of a checkpoint.
_RECORD = "record/metadata"  # Of the other files.
_CHECKSUMS = "crc32"
_CHUNK = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message names its path."""


def save(path: str | os.PathLike, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a checkpoint at `path`, replacing a checkpoint that is there once the new one is complete.

    Args:
        path: a folder: absent, empty, or a checkpoint. Other files in it stay.
        arrays: nested dict, with string keys, of arrays.
        record: what JSON can hold.

    Raises:
        ValueError: something else is at `path`.
        OSError: it could not be written; names `path`, where nothing has changed.
    """
    args = _save_args(arrays, record)
    with folders.replacing(path, own_files, WHAT) as new:
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(new, args)
            _seal(new)
        except Exception as error:  # A full disk surfaces as any of several exception types of orbax and tensorstore.
            time.sleep(0.3)  # TensorStore goes on for a moment, and would make a folder again that was removed.
            raise OSError(errno.EIO, _cause(error)) from error


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise ValueError if a checkpoint cannot be written to `path`, as something else is there."""
    folders.check_replaceable(path, own_files, WHAT)


def own_files(folder: pathlib.Path) -> list[str] | None:
    """List the files of a checkpoint that were saved with it; None for a folder that is no checkpoint of ours."""
    try:
        listed = {name for name, (_, _) in json.loads((folder / FILES).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    if _RECORD not in listed:  # Somebody else's files.json.
        return None
    # Only what is found below the folder: a list that was tampered with may name files elsewhere.
    return [*(name for name in folders.list_files(folder) if name in listed - {FILES}), FILES]


def remove(path: pathlib.Path) -> None:
    """Remove a checkpoint; what is no checkpoint of ours is left alone, as are other files in its folder."""
    folders.remove(path, own_files)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and verifies the checkpoint at `path`.

    Returns:
        (arrays, record) as saved: nested dicts of NumPy arrays, and what JSON held.

    Raises:
        CheckpointError: there is none, or it is damaged: a file is missing, truncated or altered.
    """
    check_local(path)
    folder = folders.find(pathlib.Path(path).absolute())
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    _verify_files(folder)
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = checkpointer.restore(folder, args)
        arrays, record = restored["arrays"], restored["record"]
    except Exception as error:  # Damage surfaces as any of a dozen exception types of orbax, tensorstore and json.
        raise CheckpointError(f"{folder}: not a sound checkpoint: {_first_line(error)}") from error
    content = _verify_record(folder, record)
    _verify_arrays(folder, arrays, record[_CHECKSUMS]["arrays"])
    return arrays, content


def _checkpointer():
    alone = _this_host_alone()
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _this_host_alone():
    """Lets a host save without the others: all that is saved is the same on all of them."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"host{index}"
    )


def _cause(error):
    """Returns what the system says, where an error of orbax or tensorstore holds that, in many words."""
    number = getattr(error, "errno", None) or re.search(r"os_error_code='([0-9]+)'", str(error))
    if number is None:
        return _first_line(error)
    return os.strerror(number if isinstance(number, int) else int(number[1]))


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]


def _save_args(arrays, record):
    arrays = jax.tree.map(np.asarray, dict(arrays))
    sealed = {"content": record, _CHECKSUMS: {"record": _json_checksum(record), "arrays": _checksums(arrays)}}
    return ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(sealed))


def checksum_tree(arrays: Mapping[str, Any]) -> int:
    """Computes one checksum of all the arrays of a nested dict, their names, types and shapes."""
    return _json_checksum(_checksums(arrays))


def checksum_text(content: bytes) -> str:
    """Computes the checksum of a file's content, as text: of `FILES`, it stands for all of a checkpoint."""
    return f"{zlib.crc32(content):08x}"


def _json_checksum(record):
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _checksums(arrays):
    flat = traverse_util.flatten_dict(arrays, sep="/")
    return {name: _checksum(np.asarray(value)) for name, value in flat.items()}


def _checksum(array):
    return zlib.crc32(np.ascontiguousarray(array), zlib.crc32(f"{array.dtype} {array.shape}".encode()))


def _verify_record(path, record):
    """Returns the content of a record, which fits its own checksum."""
    sums = record.get(_CHECKSUMS) if isinstance(record, dict) else None
    if not isinstance(sums, dict) or "content" not in record or not isinstance(sums.get("arrays"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of this project: its record has no checksums")
    if _json_checksum(record["content"]) != sums.get("record"):
        raise CheckpointError(f"{path}: damaged: the checksum of its record does not match")
    return record["content"]


def _verify_arrays(path, arrays, expected):
    found = _checksums(arrays)
    bad = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if bad:
        raise CheckpointError(
            f"{path}: damaged: checksum mismatch in {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}"
        )


def _seal(path):
    """Lists the files of a checkpoint in `FILES`."""
    found = sorted(file for file in path.rglob("*") if file.is_file())
    listed = {file.relative_to(path).as_posix(): [file.stat().st_size, _file_checksum(file)] for file in found}
    files.write_atomically(path / FILES, json.dumps(listed, indent=0) + "\n")


def _verify_files(path):
    """Raises CheckpointError unless all files in `FILES` are there as they were written. Others may have come."""
    try:
        listed = json.loads((path / FILES).read_bytes())
        listed = [(name, int(size), int(checksum)) for name, (size, checksum) in listed.items()]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a checkpoint of this project, or damaged: it has no {FILES}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {FILES} is not readable: {_first_line(error)}") from error
    for name, size, checksum in listed:
        if fault := _fault(path, name, size, checksum):
            raise CheckpointError(f"{path}: damaged: {name!r} {fault}")


def _fault(path, name, size, checksum):
    try:
        if name.startswith("/") or ".." in name.split("/"):
            return "lies outside of the folder"
        file = path / name  # May be a link to elsewhere, as in the cache of a hub: its content is what counts.
        if not file.is_file():
            return "is missing"
        if file.stat().st_size != size:
            return f"has {file.stat().st_size} bytes, had {size}"
        return None if _file_checksum(file) == checksum else "was altered: its checksum does not match"
    except (OSError, ValueError) as error:
        return f"cannot be read: {_first_line(error)}"


def _file_checksum(path):
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


class RunCheckpoints:
    """Writes the checkpoints of a run, folders named by their step: in the background, on the main host alone."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int,
        keep_best: int = 0,
        score: Callable[[Mapping[str, Any]], float | None] = lambda record: None,
        start_step: int = 0,
    ):
        """Makes way for what the run will save: newer folders, which are damaged, are renamed to N.damaged.

        Args:
            directory: may be missing.
            keep: how many of the newest to keep.
            keep_best: how many of the best to keep besides.
            score: of a record, the higher the better; None for one that is not in the running.
            start_step: of the checkpoint that the run goes on from.
        """
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self._saving: concurrent.futures.Future | None = None
        if jax.process_index() != 0:
            return
        self._directory = pathlib.Path(directory).absolute()
        self._keep, self._keep_best, self._score = keep, keep_best, score
        self._directory.mkdir(parents=True, exist_ok=True)
        folders.settle(self._directory, own_files)
        for step in list_steps(self._directory):
            if step > start_step:
                move_aside(self._directory / str(step))
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def save(self, step: int, arrays: Mapping[str, Any], record: Mapping[str, Any], *, replace: bool = False) -> None:
        """Starts to save; returns when `arrays`, which are on the host, may change.

        Args:
            step: if it is saved already, nothing happens, unless it is to `replace`.
            arrays, record: see the function `save`.
            replace: whether the record is a new one.

        Raises:
            OSError: the save before this one failed; names the path.
        """
        self.wait()
        if self._thread and (replace or not (self._directory / str(step)).exists()):
            copy = jax.tree.map(np.array, dict(arrays))
            self._saving = self._thread.submit(self._save, step, copy, record)

    def _save(self, step, arrays, record):
        save(self._directory / str(step), arrays, record)
        steps = list_steps(self._directory)
        for unwanted in set(steps[self._keep :]) - set(self._best(steps)):
            remove(self._directory / str(unwanted))

    def _best(self, steps):
        if not self._keep_best:
            return []
        scores = {step: self._score(_read_record(self._directory / str(step))) for step in steps}
        return sorted((step for step in steps if scores[step] is not None), key=scores.get)[-self._keep_best :]

    def check(self) -> None:
        """Raises the error of the last save if it is known by now; see `save`."""
        if self._saving and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises as `save`."""
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def close(self) -> None:
        """Waits, as `wait`, then releases the thread."""
        try:
            self.wait()
        finally:
            if self._thread:
                self._thread.shutdown()


def move_aside(path: pathlib.Path) -> None:
    """Rename a damaged checkpoint to N.damaged, or the next name with a number that is free.

    Raises:
        ValueError: nothing in the folder says that it was a checkpoint.
    """
    if (found := set(os.listdir(path))) and not found & {FILES, "arrays", "record"}:
        raise ValueError(f"{path}: was not written by this package, and is in the way of a checkpoint; move it")
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    path.rename(next(new for name in names if not (new := path.with_name(name)).exists()))


def _read_record(path):
    """Reads the record of a checkpoint alone; an empty one if it is damaged."""
    try:
        return _verify_record(path, json.loads((path / _RECORD).read_bytes()))
    except (OSError, ValueError):
        return {}


def list_steps(directory: pathlib.Path) -> list[int]:
    """Lists the steps that have a checkpoint, sound or not; the newest first."""
    return sorted((int(name) for name in folders.list_names(directory) if name.isdecimal()), reverse=True)


def newest(
    directory: str | os.PathLike, warn: Callable[[str], Any] = print
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """Loads the newest sound checkpoint of a run; `warn` hears of every damaged one that is newer.

    Returns:
        (step, arrays, record), or None where the run has no checkpoint yet.

    Raises:
        CheckpointError: there are checkpoints, none of which is sound.
    """
    check_local(directory)
    directory = pathlib.Path(directory)
    steps = list_steps(directory)
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
    """Loads a checkpoint, or the newest sound one of the run whose workdir is `path`.

    Returns:
        (arrays, record): nested dicts of NumPy arrays, with `params` among them, and what JSON held, as the config.

    Raises:
        CheckpointError: there is none, or none that is sound.
    """
    runs = pathlib.Path(path) / CHECKPOINTS
    found = newest(runs) if runs.is_dir() else (None, *load(path))
    if found is None:
        raise CheckpointError(f"{runs.absolute()}: holds no checkpoint yet")
    _, arrays, record = found
    if "params" not in arrays:
        raise CheckpointError(f"{path}: a checkpoint without parameters")
    return arrays, record
