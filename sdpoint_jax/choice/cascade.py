"""Cascades of SDPoint instances: a cheap one first; the images that it is not sure of go on from its prefix. No JAX.

Up to its point an instance computes what full resolution does, statistics included. So an image that goes on to a
later instance pays only for the layers after the point of the instance before. How many images go on is set by a
threshold on the confidence of each stage but the last: the *mean* cost of an image is what a cascade keeps to.

    chosen = select_cascade(rows, mean_macs=30e6)
    logits, stages = chosen.cascade.run(logits_by_stage)

Calibration picks thresholds, and `search` the stages, on images whose labels are known and that are reported nowhere.
"""

import dataclasses
import itertools
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdpoint_jax.choice import pareto
from sdpoint_jax.instance import SDPointInstance

CONFIDENCES = ("max_probability", "margin")
MAX_STAGES = 3  # Of the cascades that `search` tries.

_CELLS = 2**16  # Choices of thresholds that a curve is made from, at most.
_SEARCH_THRESHOLDS = 32  # Of each stage while `search` compares stages.


class Outcome(NamedTuple):
    """What a cascade says about images.

    Attributes:
        logits: [B, K], float32, of the stage at which each image stops; with `average`, the mean over its stages.
        stages: [B], int: the stage at which each image stops, from 0.
    """

    logits: np.ndarray
    stages: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Instances that run one after the other, and how sure each must be of an image for the image to stop there.

    Attributes:
        stages: at least two instances in order of depth, so that each goes on from the prefix of the one before; full
            resolution can only be the last.
        thresholds: one for each stage but the last, in 0..1: an image stops where its confidence is at least this. At
            0 all images stop; at 1 only those do that are certain to the last digit of a float64.
        confidence: `max_probability`, the highest softmax probability; or `margin`, how much higher it is than the
            second one.
        average: whether the logits of all stages that an image has passed are averaged, for its confidence and for the
            answer. (To average log-probabilities instead comes to the same: they differ by a constant per image.)

    Raises:
        ValueError: a field that does not fit; names it, its value and what is valid.
    """

    stages: tuple[SDPointInstance, ...]
    thresholds: tuple[float, ...]
    confidence: str = "max_probability"
    average: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        check_stages(self.stages)
        if len(self.thresholds) != len(self.stages) - 1:
            raise ValueError(
                f"thresholds {self.thresholds}: cascade {self.name} needs {len(self.stages) - 1}, one for each stage "
                f"but the last"
            )
        for threshold in self.thresholds:
            if isinstance(threshold, bool) or not (isinstance(threshold, numbers.Real) and 0 <= threshold <= 1):
                raise ValueError(f"threshold {reprlib.repr(threshold)}: valid are confidences in 0..1")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence {self.confidence!r}: valid are {', '.join(CONFIDENCES)}")
        if not isinstance(self.average, bool):
            raise ValueError(f"average {self.average!r}: valid are True and False")
        object.__setattr__(self, "thresholds", tuple(map(float, self.thresholds)))

    @property
    def name(self) -> str:
        """Names the stages, as `p03_r0.50+full`; `stages_from_name` is the inverse."""
        return "+".join(stage.name for stage in self.stages)

    def decide(self, logits: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Decides which images go on after the latest stage.

        Args:
            logits: [B, K] of each stage so far, for the images that have come so far.

        Returns:
            the logits [B, K], float32, of those that stop here, and which images go on, bool [B]; none after the last
            stage.
        """
        stage = len(logits) - 1
        answer = _combine(logits, self.average)[-1]
        if stage == len(self.stages) - 1:
            return answer, np.zeros(len(answer), bool)
        return answer, confidence(answer, self.confidence) < self.thresholds[stage]

    def run(self, logits_by_stage: Sequence[np.ndarray]) -> Outcome:
        """Classifies images whose logits at every stage are known: [B, K] for each stage."""
        if len(logits_by_stage) != len(self.stages):
            raise ValueError(f"logits of {len(logits_by_stage)} stages: cascade {self.name} has {len(self.stages)}")
        answers = np.empty(np.shape(logits_by_stage[0]), np.float32)
        stages = np.empty(len(answers), int)
        running = np.arange(len(answers))
        for stage in range(len(self.stages)):
            answer, goes_on = self.decide([logits[running] for logits in logits_by_stage[: stage + 1]])
            answers[running], stages[running] = answer, stage  # Those that go on are overwritten.
            running = running[goes_on]
        return Outcome(answers, stages)

    def tally(self, logits_by_stage: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
        """Counts, for each stage, the images that stop there, and those of them that are right: int [stages, 2].

        Tallies of several batches add up; see `Measured.from_tally`.
        """
        answers, stages = self.run(logits_by_stage)
        right = answers.argmax(-1) == labels
        size = len(self.stages)
        return np.stack([np.bincount(stages, minlength=size), np.bincount(stages[right], minlength=size)], -1)

    def to_record(self) -> dict[str, Any]:
        """Returns the cascade as JSON holds it."""
        return dataclasses.asdict(self) | {
            "stages": [stage.name for stage in self.stages],
            "thresholds": list(self.thresholds),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Cascade":
        """Returns the inverse of `to_record`; raises ValueError where the record is not that of a cascade."""
        return _from_record(cls, record, stages=_instances_from_names)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a cascade did on some images.

    Attributes:
        mean_macs: multiply-accumulates of an image, mean over all of them; what several stages share counts once.
        top1: share of the images that are classified correctly, in 0..1.
        n: images.
        shares: of the images that stop at each stage, in 0..1.
    """

    mean_macs: float
    top1: float
    n: int
    shares: tuple[float, ...]

    @property
    def top1_standard_error(self) -> float:
        """Returns that of `top1`, as the share of `n` independent images."""
        return (self.top1 * (1 - self.top1) / self.n) ** 0.5

    @classmethod
    def from_tally(cls, tally: np.ndarray, costs: Sequence[float]) -> "Measured":
        """Sums up.

        Args:
            tally: [stages, 2]; see `Cascade.tally`.
            costs: MACs of each stage for an image that reaches it; see `mean_cost`.

        Raises:
            ValueError: no images.
        """
        stops, right = np.asarray(tally).T
        n = int(stops.sum())
        if not n:
            raise ValueError("no images to measure a cascade on")
        macs = float(stops @ np.cumsum(costs)) / n
        return cls(macs, int(right.sum()) / n, n, tuple((stops / n).tolist()))


@dataclasses.dataclass(frozen=True)
class CascadeRow:
    """One row of the table of cascades.

    Attributes:
        cascade: the stages and their thresholds.
        macs: of each stage, for an image that reaches it: the first one whole, the others from the point before.
        calibrated_on: the images that thresholds and stages were chosen on, in words.
        calibration: what it did on these. It was chosen for that, so that this is too good.
        evaluated: what it did on the images of the sweep.
    """

    cascade: Cascade
    macs: tuple[int, ...]
    calibrated_on: str
    calibration: Measured
    evaluated: Measured

    @property
    def name(self) -> str:
        """Names the stages, as `p03_r0.50+full`."""
        return self.cascade.name

    def to_record(self) -> dict[str, Any]:
        """Returns the row as JSON holds it."""
        return dataclasses.asdict(self) | {"macs": list(self.macs), "cascade": self.cascade.to_record()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "CascadeRow":
        """Returns the inverse of `to_record`; raises ValueError where the record is not that of a row."""
        measured = dict.fromkeys(("calibration", "evaluated"), _measured_from_record)
        return _from_record(cls, record, cascade=Cascade.from_record, macs=tuple, **measured)


def _from_record(cls, record, **read: Callable):
    """Makes a dataclass from its record; `read` makes a field's value from what stands there."""
    try:
        return cls(**{key: read[key](value) if key in read else value for key, value in record.items()})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not the record of a {cls.__name__}: {error}") from None


def _measured_from_record(record):
    return _from_record(Measured, record, shares=tuple)


def _instances_from_names(names):
    return tuple(map(SDPointInstance.from_name, names))


def stages_from_name(name: str) -> tuple[SDPointInstance, ...]:
    """Returns the stages of a cascade called `name`, as `p03_r0.50+full`.

    Raises:
        ValueError: a part that is not the name of an instance, or stages that no cascade can have.
    """
    stages = _instances_from_names(part.strip() for part in name.split("+"))
    check_stages(stages)
    return stages


def check_stages(stages: Sequence[SDPointInstance]) -> None:
    """Raises ValueError unless there are at least two stages, each going on from the prefix of the one before."""
    name = "+".join(stage.name for stage in stages)
    if len(stages) < 2:
        raise ValueError(f"cascade {name or '()'}: give at least two stages, as p03_r0.50+full")
    if len(set(stages)) < len(stages):
        raise ValueError(f"cascade {name}: each stage can be there once")
    for before, after in itertools.pairwise(stages):
        if _depth(before) > _depth(after):
            raise ValueError(
                f"cascade {name}: {after.name} cannot go on from the prefix of {before.name}, which is longer; valid "
                f"are stages in order of depth: stem, p01, p02, ..., full"
            )


def _depth(instance: SDPointInstance) -> float:
    """Compares as the last point whose activation the instance shares with full resolution."""
    return instance.point or math.inf


def confidence(logits: np.ndarray, kind: str) -> np.ndarray:
    """Computes how sure logits [..., K] are: float64 [...], in 0..1; 0 where they are not finite.

    Args:
        logits: of at least two classes.
        kind: one of `CONFIDENCES`; see `Cascade`.
    """
    ordered = np.partition(np.asarray(logits, np.float64), -2, axis=-1)
    with np.errstate(invalid="ignore"):
        relative = np.exp(ordered - ordered[..., -1:])  # To the highest probability.
    highest = 1 / relative.sum(-1)
    found = highest if kind == "max_probability" else highest * (1 - relative[..., -2])
    return np.nan_to_num(found, nan=0.0)


def mean_cost(stages: np.ndarray, costs: Sequence[float]) -> float:
    """Computes the mean cost of images from the stage at which each stops, [B].

    Args:
        stages: see `Outcome`.
        costs: of each stage for an image that reaches it: MACs of the first instance whole, then of the layers of each
            other one after the point of the one before. So the prefix that two stages share counts once.
    """
    return float(np.cumsum(costs)[stages].mean())


class Curve(NamedTuple):
    """What one cascade can do on some images, for thresholds of which no other ones are better: P of them.

    Attributes:
        thresholds: [P, stages - 1].
        mean_macs: [P], ascending.
        top1: [P], ascending.
    """

    thresholds: np.ndarray
    mean_macs: np.ndarray
    top1: np.ndarray


def curve(
    logits_by_stage: Sequence[np.ndarray],
    labels: np.ndarray,
    costs: Sequence[float],
    *,
    kind: str = "max_probability",
    average: bool = False,
) -> Curve:
    """Computes the Pareto front of (mean cost, accuracy) over all thresholds.

    With one threshold, and up to 65,536 images, all partitions of the images are compared; with more of them, those at
    evenly spaced quantiles of each stage's confidences: 256 for two thresholds, 40 for three.

    Args:
        logits_by_stage: [n, K] for each stage, at least two.
        labels: [n].
        costs: see `mean_cost`.
        kind: of confidence; see `Cascade`.
        average: see `Cascade`.
    """
    answers = _combine(logits_by_stage, average)
    right = [answer.argmax(-1) == labels for answer in answers]
    confidences = [confidence(answer, kind) for answer in answers[:-1]]
    size = int(round(_CELLS ** (1 / len(confidences)), 6))
    thresholds = [_candidate_thresholds(found, size) for found in confidences]
    bins = [np.searchsorted(some, found, side="right") - 1 for some, found in zip(thresholds, confidences)]
    sizes = [len(some) for some in thresholds]
    macs, top1 = (table.ravel() for table in _tables(bins, sizes, right, costs))
    front = _front(macs, top1)
    places = np.unravel_index(front, sizes)
    chosen = np.stack([some[place] for some, place in zip(thresholds, places)], -1)
    return Curve(chosen, macs[front], top1[front])


class Calibrated(NamedTuple):
    """A cascade and what it does on the images that it was calibrated on.

    Attributes:
        cascade: with its thresholds.
        mean_macs: of an image.
        top1: share of the images that are classified correctly.
    """

    cascade: Cascade
    mean_macs: float
    top1: float

    @property
    def merit(self) -> tuple[float, float]:
        """Compares as better: more accurate; of equally accurate ones, cheaper."""
        return self.top1, -self.mean_macs


def calibrate(
    stages: Sequence[SDPointInstance],
    logits_by_stage: Sequence[np.ndarray],
    labels: np.ndarray,
    costs: Sequence[float],
    targets: Iterable[float],
    *,
    kinds: Sequence[str] = CONFIDENCES,
    averages: Sequence[bool] = (False, True),
) -> list[Calibrated | None]:
    """Finds the most accurate cascade of these stages at each mean cost; of equally accurate ones the cheapest.

    Args:
        stages: see `Cascade`.
        logits_by_stage: see `curve`.
        labels: see `curve`.
        costs: see `mean_cost`.
        targets: the highest mean costs.
        kinds: of confidence, to choose from. Of equally good ones the first is taken.
        averages: whether the stages are averaged, to choose from; likewise.

    Returns:
        the cascade for each target; None where even the first stage alone costs more.
    """
    goals = np.asarray(list(targets), float)
    best: list[Calibrated | None] = [None] * len(goals)
    for average, kind in itertools.product(averages, kinds):
        found = curve(logits_by_stage, labels, costs, kind=kind, average=average)
        for index, place in enumerate(np.searchsorted(found.mean_macs, goals, side="right") - 1):
            if place >= 0:
                cascade = Cascade(tuple(stages), tuple(found.thresholds[place].tolist()), kind, average)
                new = Calibrated(cascade, float(found.mean_macs[place]), float(found.top1[place]))
                best[index] = better(best[index], new)
    return best


def better(old: Calibrated | None, new: Calibrated | None) -> Calibrated | None:
    """Returns the better of two cascades, `old` where they are equally good; see `Calibrated.merit`."""
    return new if old is None or (new is not None and new.merit > old.merit) else old


def search(
    logits: Mapping[SDPointInstance, np.ndarray],
    labels: np.ndarray,
    costs_of: Callable[[Sequence[SDPointInstance]], Sequence[float]],
    targets: Iterable[float],
    *,
    max_stages: int = MAX_STAGES,
) -> list[tuple[SDPointInstance, ...]]:
    """Finds the pairs and triples of instances that are worth calibrating: the best ones at each mean cost.

    All of them are compared whose later stages are at least as accurate as the earlier ones, by max-probability,
    without averaging, at 32 thresholds for each stage. Of 69 instances and 10,000 images that is half a minute.

    Args:
        logits: [n, K] of each instance.
        labels: [n].
        costs_of: from stages to the costs of `mean_cost`.
        targets: mean costs at which to compare.
        max_stages: 2 for pairs alone.

    Returns:
        stages; pairs first, each once.
    """
    goals = np.sort(np.asarray(list(targets), float))
    candidates = sorted(logits, key=lambda instance: (_depth(instance), instance.ratio))
    right = {instance: (logits[instance].argmax(-1) == labels).astype(float) for instance in candidates}
    bins = {instance: _search_bins(logits[instance]) for instance in candidates}
    hits = {instance: right[instance].sum() for instance in candidates}
    found: dict[tuple[SDPointInstance, ...], None] = {}
    for size in range(2, max_stages + 1):
        best = np.full(len(goals), -1.0)
        winners: list[tuple[SDPointInstance, ...] | None] = [None] * len(goals)
        sizes = [_SEARCH_THRESHOLDS] * (size - 1)
        for stages in _stages_to_try(candidates, hits, size):
            tables = _tables([bins[s] for s in stages[:-1]], sizes, [right[s] for s in stages], costs_of(stages))
            top1 = _best_within(goals, *tables)
            for index in np.flatnonzero(top1 > best):
                best[index], winners[index] = top1[index], stages
        found |= dict.fromkeys(stages for stages in winners if stages)
    return list(found)


def pareto_front(rows: Iterable[CascadeRow]) -> list[CascadeRow]:
    """Returns the rows that no other one beats in both mean MACs and top-1 on the calibration images, cheapest first.

    The accuracy on the evaluated images plays no part: they are there to report.
    """
    front = pareto.pareto_front(rows, lambda row: row.calibration.top1, lambda row: (row.calibration.mean_macs,))
    return front[::-1]


def select_cascade(rows: Sequence[CascadeRow], mean_macs: float) -> CascadeRow:
    """Selects the cascade that was most accurate on the calibration images, of those within a mean cost.

    Args:
        rows: the table of cascades, as the artefact of a sweep keeps it.
        mean_macs: the most multiply-accumulates of an image, mean over all of them; compared with the mean cost that
            was measured on the images of the sweep.

    Raises:
        ValueError: no cascades, none that is so cheap (names the cheapest), or a budget that is no positive number.
    """
    if isinstance(mean_macs, bool) or not (isinstance(mean_macs, numbers.Real) and 0 < mean_macs < math.inf):
        raise ValueError(f"mean_macs {reprlib.repr(mean_macs)}: valid are positive, finite numbers")
    if not rows:
        raise ValueError("no cascades: evaluate.py --cascades=auto finds and keeps some")
    affordable = [row for row in rows if row.evaluated.mean_macs <= mean_macs]
    if not affordable:
        cheapest = min(rows, key=lambda row: row.evaluated.mean_macs)
        raise ValueError(
            f"mean_macs {mean_macs:g}: the cheapest cascade, {cheapest.name}, needs "
            f"{math.ceil(cheapest.evaluated.mean_macs)} MACs"
        )
    return max(affordable, key=lambda row: (row.calibration.top1, -row.evaluated.mean_macs))


def _combine(logits_by_stage: Sequence[np.ndarray], average: bool) -> list[np.ndarray]:
    """Returns the answer of each stage: its logits, or the mean of those up to there; float32."""
    answers = [np.asarray(logits, np.float32) for logits in logits_by_stage]
    if not average:
        return answers
    return [total / np.float32(count) for count, total in enumerate(itertools.accumulate(answers), 1)]


def _candidate_thresholds(confidences: np.ndarray, size: int) -> np.ndarray:
    """Returns at most `size` thresholds, ascending: 0, some between confidences that follow each other, and 1."""
    ordered = np.sort(confidences)
    count = min(len(ordered) - 1, size - 2)
    cuts = np.linspace(0, len(ordered) - 2, max(count, 0)).round().astype(int)
    return np.unique([0.0, *((ordered[cuts] + ordered[cuts + 1]) / 2), 1.0])


def _tables(
    bins: Sequence[np.ndarray], sizes: Sequence[int], right: Sequence[np.ndarray], costs: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean cost and accuracy for every choice of thresholds.

    Args:
        bins: for each stage but the last: [n], the highest threshold that each image reaches, from 0.
        sizes: how many thresholds each of these stages has.
        right: [n] for each stage: 1 where it is right, else 0.
        costs: see `mean_cost`.

    Returns:
        two arrays [*sizes]: at the place (i, j, ...) for the thresholds i of the first stage, j of the second, ...
    """
    last, macs, hits = len(sizes), np.zeros(sizes), np.zeros(sizes)
    for stage, cost in enumerate(np.cumsum(costs)):
        shape = tuple(sizes[: stage + 1])
        if stage < last:
            places = np.ravel_multi_index(tuple(bins[: stage + 1]), shape)
            images = np.bincount(places, minlength=math.prod(shape)).reshape(shape)
        right_here = np.bincount(places, right[stage], minlength=math.prod(shape)).reshape(shape)
        spread = shape + (1,) * (last - len(shape))
        macs += cost * _stopping(images, stage).reshape(spread)
        hits += _stopping(right_here, stage).reshape(spread)
    return macs / len(right[0]), hits / len(right[0])


def _stopping(table: np.ndarray, stage: int) -> np.ndarray:
    """Sums a table of images by bins over those that stop at `stage`: below all thresholds before, and not there."""
    for axis in range(table.ndim):
        below = np.cumsum(table, axis=axis) - table
        table = table.sum(axis, keepdims=True) - below if axis == stage else below
    return table


def _front(macs: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """Returns the places of the points that no other one beats in both, [P], from the cheapest on."""
    order = np.lexsort((-top1, macs))
    highest = np.maximum.accumulate(top1[order])
    return order[np.concatenate([[True], highest[1:] > highest[:-1]])[: len(order)]]


def _search_bins(logits: np.ndarray) -> np.ndarray:
    found = confidence(logits, "max_probability")
    return np.searchsorted(_candidate_thresholds(found, _SEARCH_THRESHOLDS), found, side="right") - 1


def _stages_to_try(
    candidates: Sequence[SDPointInstance], hits: Mapping[SDPointInstance, float], size: int
) -> Iterator[tuple[SDPointInstance, ...]]:
    """Yields the combinations of so many stages that may make a good cascade; `candidates` are in order of depth."""
    for stages in itertools.combinations(candidates, size):
        if all(hits[before] <= hits[after] for before, after in itertools.pairwise(stages)):
            yield stages


def _best_within(goals: np.ndarray, macs: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """Returns the highest accuracy at each mean cost; -1 where there is none. `goals` ascend."""
    best = np.full(len(goals) + 1, -1.0)
    np.maximum.at(best, np.searchsorted(goals, macs.ravel()), top1.ravel())
    return np.maximum.accumulate(best[:-1])
