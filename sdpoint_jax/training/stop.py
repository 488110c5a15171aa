"""What may come between a run and its end: a request to stop, or a second run in the same workdir."""

import fcntl
import os
import pathlib
import signal
import sys

STOPPED = 75  # Exit code after a stop on request (EX_TEMPFAIL): the same command goes on.
LOCK = "lock"


class StopSignals:
    """As a context, takes SIGTERM and the first SIGINT as a request to stop; a second SIGINT ends the process at once.

    Attributes:
        received: whether one came.
        unsaved: whether there is something to save first. If not, as while programs compile, the process exits at
            once, with `STOPPED`.
    """

    received = False
    unsaved = False

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = True
        if not self.unsaved:
            print("stopped before there was anything to save; the same command goes on", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # The system's own: it waits for no Python code.


class WorkdirLock:
    """As a context, keeps other runs out of a workdir; the system releases it however the process ends."""

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / LOCK

    def __enter__(self):
        """Raises ValueError if another process holds the lock, OSError where the workdir cannot be written to."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            raise ValueError(f"workdir {self._path.parent}: in use by another run (process {holder})") from None
        try:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path}: could not be written: {error.strerror}") from error
        return self

    def __exit__(self, *_):
        self._file.close()
