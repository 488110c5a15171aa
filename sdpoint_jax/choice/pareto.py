"""The Pareto front of accuracy against any number of costs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def pareto_front(
    items: Iterable[Item],
    accuracy: Callable[[Item], float],
    costs: Callable[[Item], Sequence[float]],
    tie: Callable[[Item], Any] | None = None,
) -> list[Item]:
    """Return the items that no other item dominates, most accurate first.

    An item dominates another if it is at least as accurate and at least as cheap in every cost. Of items that are
    equal in all of these, the first by `tie` is kept; without `tie`, the first one given.
    """
    kept: list[Item] = []
    # Whatever dominates an item, or equals it, comes before it in this order.
    for item in sorted(items, key=lambda item: (-accuracy(item), tuple(costs(item)), tie(item) if tie else 0)):
        own = costs(item)
        if not any(all(a <= b for a, b in zip(costs(other), own, strict=True)) for other in kept):
            kept.append(item)
    return kept
