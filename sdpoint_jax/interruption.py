"""What may come between a run and its end: a request to stop, or a second run in the same workdir."""

import fcntl
import os
import pathlib
import signal

LOCK = "lock"


class StopSignals:
    """As a context, takes SIGTERM and the first SIGINT as a request to stop; a second SIGINT acts as ever."""

    received = False

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])


class WorkdirLock:
    """As a context, keeps other runs out of a workdir; the system releases it however the process ends."""

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / LOCK

    def __enter__(self):
        """Raises ValueError if another process holds the lock."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            raise ValueError(f"workdir {self._path.parent}: in use by another run (process {holder})") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *_):
        self._file.close()
