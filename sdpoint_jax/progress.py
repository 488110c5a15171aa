"""Progress on the terminal of the main host: bars where one watches, plain lines elsewhere."""

import time
from collections.abc import Hashable, Iterable, Iterator
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
