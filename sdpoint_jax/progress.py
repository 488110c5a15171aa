"""Progress on the terminal of the main host: bars where one watches, plain lines elsewhere."""

import time
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line, above a bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line)


def bar(items: Iterable | None = None, **kwargs: Any) -> tqdm:
    """Makes a progress bar, over `items` or by hand, shown on a terminal only; see `tqdm`."""
    return tqdm(items, disable=None if jax.process_index() == 0 else True, dynamic_ncols=True, **kwargs)


class CompilingBehind:
    """Says how far programs are that compile behind the steps of a run: after the first step, and once all are there.

    Attributes:
        waited: seconds that steps have waited for their programs so far.
    """

    def __init__(self, total: int, what: str, start: float):
        """Takes the number of the programs, what they are, and the `time.perf_counter()` from which time counts."""
        self._start, self._total, self._what = start, total, what
        self._is_first, self._is_over, self.waited = True, not total, 0.0

    def describe(self, count: int) -> str:
        """Describes for a bar that `count` programs are there; empty once all are."""
        return f"compiled {count} of {self._total}, " if count < self._total else ""

    def report_step(self, seconds: Collection[float]) -> None:
        """Takes note of a step, and of the seconds that each program took that is there by now."""
        count, elapsed = len(seconds), time.perf_counter() - self._start
        if self._is_first and count < self._total:
            say(f"first step after {elapsed:.1f} s: compiled {count} of {self._total} programs, the others follow")
        if not self._is_over and count == self._total:
            self._is_over = True
            mean = sum(seconds) / count
            say(
                f"compiled {count} programs, {self._what}: {elapsed:.1f} s ({mean:.1f} s a program), "
                f"of which steps waited for {self.waited:.1f} s"
            )
        self._is_first = False


def compile_with_bar(compiled: Iterator[tuple[Hashable, float]], total: int, what: str) -> None:
    """Runs `compiled`, as of `Switch.compile`, and says how long it took, and how long a program took."""
    start, work, count = time.perf_counter(), 0.0, 0
    with bar(total=total, desc=f"compiling {what}", unit="program") as shown:
        for key, seconds in compiled:
            work, count = work + seconds, count + 1
            shown.set_postfix_str(str(key), refresh=False)
            shown.update()
    if count:
        elapsed = time.perf_counter() - start
        say(f"compiled {count} programs, {what}: {elapsed:.1f} s ({work / count:.1f} s a program)")
