"""Keeps a second process out of a folder."""

import contextlib
import fcntl
import os
import pathlib

from sdpoint_jax.paths import check_local

LOCK = "lock"


class FolderLock:
    """As a context, holds the lock of a folder; the system releases it however the process ends."""

    def __init__(self, folder: pathlib.Path, what: str):
        """Names the folder, and in a word `what` it is, for messages."""
        check_local(folder)
        self._path, self._what = folder / LOCK, what
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "FolderLock":
        """Take the lock.

        Raises:
            ValueError: another process holds it, or the file of its name is not a lock.
            OSError: the folder cannot be written to.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._held.enter_context(self._path.open("a+"))
        if not _is_lock(self._path):
            self._held.close()
            raise ValueError(f"{self._path}: was not written by this package, and is in the way of its lock; move it")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "?"
            self._held.close()
            raise ValueError(f"{self._what} {self._path.parent}: in use by another run (process {holder})") from None
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except OSError as error:
            raise OSError(f"{self._path}: could not be written: {error.strerror}") from error
        return self

    def __exit__(self, *_):
        self._held.close()


def _is_lock(path):
    """Whether a file holds nothing but the number of a process."""
    with path.open("rb") as file:
        return file.read(32).isdigit() or path.stat().st_size == 0
