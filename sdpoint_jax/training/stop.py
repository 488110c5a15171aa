"""A request to stop a run: SIGTERM or Ctrl-C."""

import os
import signal
import sys
from typing import NoReturn

STOPPED = 75  # Exit code after a stop on request (EX_TEMPFAIL): the same command goes on.


def leave() -> NoReturn:
    """Ends the process with `STOPPED`, all being saved: the usual end would wait for programs that still compile."""
    import jax  # Late, as the command line reads `STOPPED` before it sets JAX up.

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # Together with the others, who stop at the same step.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STOPPED)


class StopSignals:
    """As a context, takes SIGTERM and the first SIGINT as a request to stop; a second SIGINT ends the process at once.

    Attributes:
        received: whether one came.
        unsaved: whether there is something to save first. If not, as before the first step, the process exits at
            once, with `STOPPED`.
    """

    def __init__(self):
        self.received = self.unsaved = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
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
