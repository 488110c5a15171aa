"""Progress on the terminal: bars where one watches, plain lines elsewhere."""

import time
from collections.abc import Hashable, Iterable, Iterator

from tqdm import tqdm


def bar(**kwargs) -> tqdm:
    """A progress bar, shown on a terminal only; see `tqdm`."""
    return tqdm(disable=None, dynamic_ncols=True, **kwargs)


def compile_with_bar(compiled: Iterator[tuple[Hashable, float]], total: int, what: str) -> None:
    """Runs `compiled`, as of `Switch.compile`, and reports the time it took and the work it was."""
    start, work, count = time.perf_counter(), 0.0, 0
    with bar(total=total, desc=f"compiling {what}", unit="program") as shown:
        for key, seconds in compiled:
            work, count = work + seconds, count + 1
            shown.set_postfix_str(str(key), refresh=False)
            shown.update()
    if count:
        elapsed = time.perf_counter() - start
        print(f"compiled {count} programs, {what}: {elapsed:.1f} s ({work / count:.1f} s a program)", flush=True)


def track(items: Iterable, total: int, description: str) -> Iterator:
    """Yields `items` with a bar."""
    return iter(tqdm(items, total=total, desc=description, disable=None, dynamic_ncols=True))
