"""Keeps a second process out of a folder."""

import fcntl
import os
import pathlib

LOCK = "lock"


class FolderLock:
    """As a context, holds the lock of a folder; the system releases it however the process ends."""

    def __init__(self, folder: pathlib.Path, what: str):
        """Names the folder, and in a word `what` it is, for messages."""
        self._path, self._what, self._file = folder / LOCK, what, None

    def __enter__(self) -> "FolderLock":
        """Raises ValueError if another process holds the lock, OSError where the folder cannot be written to."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            raise ValueError(f"{self._what} {self._path.parent}: in use by another run (process {holder})") from None
        try:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path}: could not be written: {error.strerror}") from error
        return self

    def __exit__(self, *_):
        self._file.close()
