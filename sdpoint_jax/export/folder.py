"""Folders that are whole at any moment, however the process that writes them ends."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path, is_ours: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """Gives, as a context, an empty folder to write to, which becomes the one at `path` at the end.

    Args:
        path: may exist, if it is empty or `is_ours`; it is as it was until the end, and after an error.
        is_ours: tells of a folder whether it may be replaced.

    Raises:
        ValueError: another file or folder is at `path`.
        OSError: it could not be written; names `path`.
    """
    path = pathlib.Path(path).resolve()
    writing, replaced = (path.with_name(f"{path.name}.{ending}") for ending in ("writing", "replaced"))
    if replaced.exists() and not path.exists():
        replaced.rename(path)  # A process was killed between the two renames at the end.
    if path.exists() and not (path.is_dir() and (is_ours(path) or not any(path.iterdir()))):
        raise ValueError(f"{path}: exists, and is not an export; only an export is replaced")
    try:
        for leftover in (writing, replaced):  # Of a process that was killed.
            shutil.rmtree(leftover, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        _put_in_place(writing, path, replaced)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _put_in_place(writing, path, replaced):
    for file in writing.rglob("*"):
        _flush(file)
    if path.exists():
        path.rename(replaced)
    writing.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(path):
    """Returns when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
