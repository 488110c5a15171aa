"""Which SDPoint instance to run within a budget: of compute, of time, of memory, or for a wanted accuracy. No JAX.

row = select(rows, Budget(max_latency_ms=2.5, batch_size=8))
print(row.name, row.top1)

Costs are of three dimensions: `macs` of one image; `latency`, the median time of one call in milliseconds; `memory`,
the planned peak of one call. The last two are those measured at one batch size, device, runtime and dtype: they are
never extrapolated, and a row without that measurement is not offered where they count. Where several runtimes were
measured and none is named, the faster one counts, for each instance and batch size: predictors use it.
"""

import dataclasses
import decimal
import math
import numbers
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from sdpoint_jax.choice import pareto
from sdpoint_jax.choice.table import InstanceRow, Latency

PREFERENCES = ("most accurate", "cheapest", "cheapest within one standard error")
DIMENSIONS = ("latency", "macs", "memory")  # In the order in which `select` compares costs.

Where = tuple[str, str | None, str]  # Device, runtime (None: the faster one), dtype.

_MEGABYTE = 1e6
_LIMITS = {"max_latency_ms": "latency", "max_macs": "macs", "max_memory_mb": "memory"}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an answer may cost, and how good it must be; any combination.

    Attributes:
        max_macs: multiply-accumulates for one image.
        max_latency_ms: median time of one call on a batch of `batch_size`, in milliseconds.
        max_memory_mb: planned peak memory of such a call, in megabytes of 10^6 bytes.
        min_top1: top-1 accuracy that is wanted, as a share in 0..1. Alone, without a limit on a cost, it asks for the
            cheapest instance that is so accurate.
        batch_size: images of one call; counts for latency and memory.

    Raises:
        ValueError: a value that is not a number or out of its range; names the field and the value.
    """

    max_macs: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    min_top1: float | None = None
    batch_size: int = 1

    def __post_init__(self):
        for field in _LIMITS:
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{field} {reprlib.repr(value)}: valid are positive, finite numbers")
        if self.min_top1 is not None:
            _check_share("min_top1", self.min_top1)
        if not (_is_number(self.batch_size) and isinstance(self.batch_size, numbers.Integral) and self.batch_size > 0):
            raise ValueError(f"batch_size {reprlib.repr(self.batch_size)}: valid are 1, 2, 3, ...")

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Lists the dimensions of cost that count: those that are limited; where none is, MACs."""
        limited = {dimension for field, dimension in _LIMITS.items() if getattr(self, field) is not None}
        return tuple(name for name in DIMENSIONS if name in limited) or ("macs",)

    @property
    def is_of_measurements(self) -> bool:
        """Tells whether it limits latency or memory, which are measured on a device."""
        return self.dimensions != ("macs",)

    @property
    def limits_a_cost(self) -> bool:
        """Tells whether any cost is limited."""
        return any(getattr(self, field) is not None for field in _LIMITS)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A row with its place in the table and its costs, by dimension, where they count."""

    row: InstanceRow
    order: int
    costs: tuple[float, ...]

    @property
    def expense(self) -> tuple[float, ...]:
        """Compares as cheaper: in the first dimension, then the next, then MACs, then the place in the table."""
        return *self.costs, self.row.macs, self.order


def select(
    rows: Sequence[InstanceRow],
    budget: Budget,
    *,
    device: str | None = None,
    runtime: str | None = None,
    dtype: str | None = None,
    prefer: str = "most accurate",
) -> InstanceRow:
    """Selects the instance for a budget. The same rows and budget always give the same row.

    The cheaper of two instances is the one with the lower latency, if latency is limited; with the fewer MACs, if MACs
    are limited or no cost is; with the smaller memory, if that is limited: the first of these in which they differ.
    After that come MACs in any case, and the order of `rows`. Dominated rows are never offered (see `pareto_front`): of
    instances that are equally cheap in the limited dimensions the most accurate one is left.

    Args:
        rows: the table of a sweep.
        budget: what it may cost and how accurate it must be.
        device: on which latency and memory were measured; None for the only one there is.
        runtime: likewise, as `xla`; None for the faster one. Memory is known for `xla` alone.
        dtype: as `device`, `float32` or `bfloat16`.
        prefer: of the instances within the budget,
            `most accurate`: the one with the highest top-1, of equal ones the cheapest. A budget of `min_top1` alone
            has no costs to spend: it gets the `cheapest`;
            `cheapest`: the cheapest;
            `cheapest within one standard error`: the cheapest of those whose top-1 is below the highest by less than
            the standard error of the difference, taken as that of two independent samples of n images. In truth all
            rows are measured on the same images and their errors go together, so that the true standard error is
            smaller: this errs on the side of calling a difference noise.

    Returns:
        one of `rows`.

    Raises:
        ValueError: no instance is within the budget (names the nearest possible), latency or memory was not measured
            in that setting (names those that were), or an unknown preference.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer {prefer!r}: valid are {', '.join(PREFERENCES)}")
    affordable = _front(_affordable(rows, budget, device, runtime, dtype))
    best = max(affordable, key=lambda candidate: candidate.row.top1).row
    if prefer == "most accurate" and (budget.limits_a_cost or budget.min_top1 is None):
        affordable = [candidate for candidate in affordable if candidate.row.top1 == best.top1]
    elif prefer == "cheapest within one standard error":
        affordable = [candidate for candidate in affordable if _is_tie(candidate.row, best)]
    return min(affordable, key=lambda candidate: candidate.expense).row


def list_affordable(
    rows: Sequence[InstanceRow],
    budget: Budget,
    *,
    device: str | None = None,
    runtime: str | None = None,
    dtype: str | None = None,
) -> list[InstanceRow]:
    """Lists all rows within a budget, dominated ones as well, in the order of `rows`.

    Args and errors are those of `select`.
    """
    return [candidate.row for candidate in _affordable(rows, budget, device, runtime, dtype)]


def pareto_front(
    rows: Sequence[InstanceRow],
    by: Iterable[str] = ("macs",),
    *,
    batch_size: int = 1,
    device: str | None = None,
    runtime: str | None = None,
    dtype: str | None = None,
) -> list[InstanceRow]:
    """Returns the rows that no other one dominates, from the cheapest on.

    A row dominates another if it is at least as accurate (top-1) and at least as cheap in every dimension of `by`, and
    better in one of these. Of rows that are equal in all of them, the one with the fewest MACs is kept; of those, the
    first.

    Args:
        rows: the table of a sweep.
        by: dimensions of cost, of `macs`, `latency`, `memory`.
        batch_size: at which latency and memory were measured. Rows that were not measured there are left out.
        device: on which they were measured; None for the only one there is.
        runtime: likewise; None for the faster one.
        dtype: as `device`.

    Raises:
        ValueError: an unknown dimension, or no measurement in that setting; names those that there are.
    """
    wanted = set(by)
    if not wanted or wanted - set(DIMENSIONS):
        raise ValueError(f"by {sorted(wanted)}: name one or more of {', '.join(DIMENSIONS)}")
    dimensions = tuple(name for name in DIMENSIONS if name in wanted)
    _, candidates = _candidates(rows, dimensions, batch_size, device, runtime, dtype)
    return [candidate.row for candidate in _front(candidates)]


def find_setting(
    rows: Sequence[InstanceRow],
    *,
    device: str | None = None,
    runtime: str | None = None,
    dtype: str | None = None,
) -> Where:
    """Finds the one device, runtime and dtype of measurements that the arguments name.

    Args:
        rows: the table of a sweep.
        device: on which any of the rows was measured; None for the only one there is.
        runtime: likewise, of those on that device; None for whichever is the faster.
        dtype: as `device`, of those with that runtime.

    Returns:
        device, runtime and dtype; the runtime is None where several were measured and none is named.

    Raises:
        ValueError: nothing was measured there, or there are several and none is named; lists those that there are.
    """
    measured = [latency for row in rows for latency in row.latencies]
    if not measured:
        raise ValueError(
            "latency and memory: not measured for any instance; run: python -m sdpoint_jax profile ARTEFACT"
        )
    measured = _narrow(measured, "device", device)
    if runtime is not None:
        measured = _narrow(measured, "runtime", runtime)
    measured = _narrow(measured, "dtype", dtype)
    found, several, computed = measured[0].setting[:3], {m.runtime for m in measured}, measured[0].dtype
    return found if len(several) == 1 else (measured[0].device, None, computed)


def list_batch_sizes(rows: Sequence[InstanceRow], setting: Where) -> list[int]:
    """Lists the batch sizes at which any of the rows was measured in a setting; see `find_setting`."""
    return sorted({size for row in rows for size in list_latencies(row, setting)})


def list_latencies(row: InstanceRow, setting: Where) -> dict[int, Latency]:
    """Lists, by batch size, what was measured in a setting; where it names no runtime, that of the faster one."""
    device, runtime, dtype = setting
    found: dict[int, Latency] = {}
    for latency in row.latencies:
        if latency.device == device and latency.dtype == dtype and runtime in (None, latency.runtime):
            other = found.get(latency.batch_size)
            if other is None or latency.p50_ms < other.p50_ms:
                found[latency.batch_size] = latency
    return found


def choose_runtime(row: InstanceRow, batch_size: int, *, device: str, dtype: str) -> str | None:
    """Names the runtime that was measured to be the faster one for an instance; None where nothing was measured.

    A batch size that was not measured goes as the next larger one that was, or else as the largest.
    """
    measured = list_latencies(row, (device, None, dtype))
    if not measured:
        return None
    counted = min((size for size in measured if size >= batch_size), default=max(measured))
    return measured[counted].runtime


def check_device(rows: Iterable[InstanceRow], at_hand: str, wanted: str | None = None) -> str:
    """Finds the device by whose measurements to select; warns if that is not the one at hand.

    Args:
        rows: the table of a sweep.
        at_hand: the device that is to run what is selected.
        wanted: the device that is named; None for the one at hand.

    Returns:
        `wanted`; where there is none, the device at hand if it was measured, else the one that was measured last.

    Raises:
        ValueError: nothing was measured at all.
    """
    measured = list(dict.fromkeys(latency.device for row in rows for latency in row.latencies))
    if not measured:
        raise ValueError("latency and memory: not measured on any device; run: python -m sdpoint_jax profile ARTEFACT")
    chosen = wanted or (at_hand if at_hand in measured else measured[-1])
    if chosen != at_hand and chosen in measured:
        message = f"latency measured on {chosen!r} is used on {at_hand!r}, where it may be quite another"
        warnings.warn(f"{message}; run: python -m sdpoint_jax profile ARTEFACT", stacklevel=2)
    return chosen


def _narrow(measured: list[Latency], field: str, value: str | None) -> list[Latency]:
    """Keeps the measurements in one setting of `field`: `value`, or the only one there is."""
    found = sorted({getattr(latency, field) for latency in measured})
    if value is None and len(found) > 1:
        raise ValueError(f"{field}: measured are {', '.join(found)}; name one of them")
    if value is not None and value not in found:
        raise ValueError(f"{field} {value!r}: measured are {', '.join(found)}")
    return [latency for latency in measured if value in (None, getattr(latency, field))]


def _candidates(rows, dimensions, batch_size, device, runtime, dtype) -> tuple[Any, list[_Candidate]]:
    """Finds the setting of the measurements, None where none counts, and the rows whose costs are known."""
    if not rows:
        raise ValueError("rows: the table is empty")
    setting = None
    if dimensions != ("macs",):
        where = find_setting(rows, device=device, runtime=runtime, dtype=dtype)
        if batch_size not in (sizes := list_batch_sizes(rows, where)):
            listed = ", ".join(map(str, sizes))
            raise ValueError(f"batch_size {batch_size}: measured are {listed} on {_describe(where)}")
        setting = *where, batch_size
    found = []
    for order, row in enumerate(rows):
        measured = _find_latency(row, setting, "memory" in dimensions) if setting else None
        costs = tuple(_cost(row, measured, dimension) for dimension in dimensions)
        if None not in costs:
            found.append(_Candidate(row, order, costs))
    if not found:
        raise ValueError(f"max_memory_mb: the memory of no instance is known at batch size {_describe_at(setting)}")
    return setting, found


def _find_latency(row, setting, with_memory: bool) -> Latency | None:
    """Finds the latency in a setting, batch size included; if memory counts, of those where it is known."""
    *where, batch_size = setting
    if with_memory:
        known = tuple(latency for latency in row.latencies if latency.peak_memory_bytes is not None)
        row = dataclasses.replace(row, latencies=known)
    return list_latencies(row, tuple(where)).get(batch_size)


def _affordable(rows, budget, device, runtime, dtype) -> list[_Candidate]:
    setting, candidates = _candidates(rows, budget.dimensions, budget.batch_size, device, runtime, dtype)
    affordable = [candidate for candidate in candidates if not _exceeded(candidate, budget)]
    if not affordable:
        raise ValueError(_explain_impossible(_front(candidates), budget, setting))
    return affordable


def _cost(row: InstanceRow, measured: Latency | None, dimension: str) -> float | None:
    if dimension == "macs":
        return row.macs
    if measured is None:
        return None
    if dimension == "latency":
        return measured.p50_ms
    return None if measured.peak_memory_bytes is None else measured.peak_memory_bytes / _MEGABYTE


def _front(candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the candidates that none dominates, from the cheapest on; of equal ones the first by `expense`."""
    front = pareto.pareto_front(candidates, lambda one: one.row.top1, lambda one: one.costs, lambda one: one.expense)
    return sorted(front, key=lambda candidate: candidate.expense)


def _is_tie(row: InstanceRow, best: InstanceRow) -> bool:
    difference = best.top1 - row.top1
    return difference == 0 or difference < math.hypot(best.top1_standard_error, row.top1_standard_error)


def _needs(candidate: _Candidate, budget: Budget) -> dict[str, tuple[float, float]]:
    """Lists what the candidate has and what the budget allows, by field of the budget that is set."""
    costs = dict(zip(budget.dimensions, candidate.costs))
    needs = {field: (costs.get(dimension), getattr(budget, field)) for field, dimension in _LIMITS.items()}
    needs["min_top1"] = candidate.row.top1, budget.min_top1
    return {field: (has, limit) for field, (has, limit) in needs.items() if limit is not None}


def _exceeded(candidate: _Candidate, budget: Budget) -> list[str]:
    """Lists the fields of the budget that the candidate does not keep."""
    needs = _needs(candidate, budget).items()
    return [field for field, (has, limit) in needs if (has < limit if field == "min_top1" else has > limit)]


def _explain_impossible(candidates: list[_Candidate], budget: Budget, setting) -> str:
    """Says which limits no instance keeps, and what is nearest; or that none keeps all of them, and which comes close.

    The closest is the one whose worst ratio to a limit is smallest.
    """
    at = f" at batch size {_describe_at(setting)}" if setting else ""
    exceeded = [set(_exceeded(candidate, budget)) for candidate in candidates]
    if alone := [field for field in _needs(candidates[0], budget) if all(field in fields for fields in exceeded)]:
        return "; ".join(_explain_limit(candidates, budget, field, at) for field in alone)

    def excess(candidate):
        needs = _needs(candidate, budget).items()
        return max(limit / max(has, 1e-9) if field == "min_top1" else has / limit for field, (has, limit) in needs)

    closest = min(candidates, key=lambda candidate: (excess(candidate), candidate.expense))
    limits = " and ".join(f"{field} {_given(limit)}" for field, (_, limit) in _needs(closest, budget).items())
    has = ", ".join(_VERBS[field][1].format(_show(field, has)) for field, (has, _) in _needs(closest, budget).items())
    return f"{limits}: each can be kept, but not together; the closest instance, {closest.row.name}, {has}{at}"


def _explain_limit(candidates, budget, field, at):
    nearest = (max if field == "min_top1" else min)(candidates, key=lambda c: _needs(c, budget)[field][0])
    superlative, verb = _VERBS[field]
    where = at if field in ("max_latency_ms", "max_memory_mb") else ""
    value = verb.format(_show(field, _needs(nearest, budget)[field][0]))
    return f"{field} {_given(getattr(budget, field))}: the {superlative} instance, {nearest.row.name}, {value}{where}"


_VERBS = {
    "max_latency_ms": ("fastest", "takes {} ms"),
    "max_macs": ("cheapest", "needs {} MACs"),
    "max_memory_mb": ("smallest", "needs {} MB"),
    "min_top1": ("most accurate", "has a top-1 of {}"),
}


def _show(field: str, value: float) -> str:
    """Formats four digits, so rounded that the number shown is possible as a limit; MACs in full."""
    if field == "max_macs":
        return str(value)
    rounding = decimal.ROUND_FLOOR if field == "min_top1" else decimal.ROUND_CEILING
    return f"{decimal.Context(prec=4, rounding=rounding).create_decimal(repr(float(value))):f}"


def _given(value: float) -> str:
    return reprlib.repr(int(value) if isinstance(value, numbers.Integral) else float(value))


def _describe(setting: Sequence) -> str:
    device, runtime, dtype = setting[:3]
    return f"{device} ({runtime or 'the faster runtime'}, {dtype})"


def _describe_at(setting: Sequence) -> str:
    return f"{setting[3]} on {_describe(setting)}"


def _is_number(value: Any) -> bool:
    """Tells whether it is a finite real number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An int that no float can hold.
        return False


def _check_share(field: str, value: Any) -> None:
    if _is_number(value) and 1 < value <= 100:
        raise ValueError(f"{field} {value:g}: it is a share in 0..1; for {value:g} % give {value / 100:g}")
    if not (_is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{field} {reprlib.repr(value)}: valid are shares in 0..1")
