"""SDPoint instances: which downsampling point, which ratio, and the seeded draw of one per step.

An instance is the network whose feature map is shrunk once, at one point, by one ratio (Kuen et al. 2018,
section 3.1). This module needs neither JAX nor the nets, so that any host can know the draw of any step.
"""

import dataclasses
import math
import operator
import random
import re
from collections.abc import Callable, Iterable, Sequence

STEM = -1  # The point that replaces the max-pool of an ImageNet stem.
DEFAULT_RATIOS = (0.5, 0.75)  # Kuen et al. 2018, section 4.

_NAME = re.compile(r"(?:stem|p(?P<block>[0-9]+))_r(?P<ratio>[0-9]*\.?[0-9]+(?:e-[0-9]+)?)")


@dataclasses.dataclass(frozen=True)
class SDPointInstance:
    """The network downsampled at `point` by `ratio`; without arguments, at full resolution.

    Attributes:
        point: 0 for no downsampling, k >= 1 for right after the addition of residual block k, `STEM` (-1) for
            the stem's max-pool.
        ratio: side of the downsampled feature map over its side before, in (0, 1); 1.0 if and only if `point` is 0.

    Raises:
        ValueError: a point or ratio outside of these sets.
    """

    point: int = 0
    ratio: float = 1.0

    def __post_init__(self):
        try:
            object.__setattr__(self, "point", operator.index(self.point))
            object.__setattr__(self, "ratio", float(self.ratio))
        except (TypeError, ValueError):
            raise ValueError(
                f"point {self.point!r}, ratio {self.ratio!r}: a point is a whole number, a ratio a number"
            ) from None
        if self.point < STEM:
            raise ValueError(f"point {self.point}: valid are {STEM} (stem), 0 (full resolution) and 1, 2, ... (blocks)")
        if self.point == 0 and self.ratio != 1.0:
            raise ValueError(f"ratio {self.ratio} at point 0: full resolution has ratio 1.0")
        if self.point != 0 and not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio {self.ratio} at point {self.point}: a downsampling ratio lies in (0, 1)")

    @property
    def name(self) -> str:
        """Names the instance, as `full`, `stem_r0.50`, `p05_r0.75`; `from_name` is the inverse."""
        if self.point == 0:
            return "full"
        short = f"{self.ratio:.2f}"
        ratio = short if float(short) == self.ratio else repr(self.ratio)
        return ("stem" if self.point == STEM else f"p{self.point:02d}") + f"_r{ratio}"

    @classmethod
    def from_name(cls, name: str) -> "SDPointInstance":
        """Returns the instance called `name`.

        Raises:
            ValueError: `name` is not the name of an instance.
        """
        if name == "full":
            return FULL_RESOLUTION
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(
                f"instance name {name!r}: valid are full, stem_r0.50, p05_r0.75 (a point and a ratio in (0, 1))"
            )
        return cls(int(match["block"]) if match["block"] else STEM, float(match["ratio"]))

    def __str__(self) -> str:
        return self.name


FULL_RESOLUTION = SDPointInstance()


def list_instances(
    num_blocks: int,
    *,
    has_stem_point: bool,
    ratios: Iterable[float] = DEFAULT_RATIOS,
    points: Iterable[int] | None = None,
) -> tuple[SDPointInstance, ...]:
    """Lists the instances of a net in order of depth: full resolution, the stem, block 1, ..., block N.

    Args:
        num_blocks: N, the number of residual blocks.
        has_stem_point: whether the stem has a max-pool, hence a point of its own.
        ratios: the downsampling ratios at every point.
        points: a subset of the net's points; all by default.

    Returns:
        1 + len(ratios) * (N + has_stem_point) instances where `points` is None; ratios ascend within a point.

    Raises:
        ValueError: a point that the net does not have, no point at all, or a ratio outside of (0, 1).
    """
    net_points = (0, *((STEM,) if has_stem_point else ()), *range(1, num_blocks + 1))
    wanted = set(net_points if points is None else points)
    if not wanted:
        raise ValueError("no downsampling points: name at least one (0 is full resolution)")
    if unknown := sorted(wanted - set(net_points)):
        raise ValueError(f"points {unknown}: the net has {describe_points(num_blocks, has_stem_point)}")
    ratios = sorted(set(ratios))
    if not ratios and wanted != {0}:
        raise ValueError("no downsampling ratios: name at least one in (0, 1)")
    return tuple(
        SDPointInstance(point, ratio)
        for point in net_points
        if point in wanted
        for ratio in ((1.0,) if point == 0 else ratios)
    )


def describe_points(num_blocks: int, has_stem_point: bool) -> str:
    """Describes the points of a net in words, for messages."""
    stem = f"{STEM} (stem), " if has_stem_point else ""
    return f"{stem}0 (full resolution) and 1 to {num_blocks}"


def uniform_sampling(uniform: Callable[[], float], instances: Sequence[SDPointInstance]) -> SDPointInstance:
    """Draws as the paper does: the point uniform over the points of `instances`, then the ratio over its ratios."""
    points = list(dict.fromkeys(instance.point for instance in instances))
    point = points[int(uniform() * len(points))]
    at_point = [instance for instance in instances if instance.point == point]
    return at_point[int(uniform() * len(at_point))]


def legacy_sampling(uniform: Callable[[], float], instances: Sequence[SDPointInstance]) -> SDPointInstance:
    """Draws as the authors' PyTorch release does, fault included: block 1 falls through to full resolution.

    There the drawn block id 0 (our point 1) is falsy in `drawn and id or nil`. For comparison with runs of the
    original only; `instances` must hold full resolution.
    """
    drawn = uniform_sampling(uniform, instances)
    return FULL_RESOLUTION if drawn.point == 1 else drawn


def weighted_sampling(
    uniform: Callable[[], float], instances: Sequence[SDPointInstance], weights: Sequence[float]
) -> SDPointInstance:
    """Draws each instance with a probability in proportion to its weight."""
    left = uniform() * sum(weights)
    for instance, weight in zip(instances, weights, strict=True):
        left -= weight
        if left < 0:
            return instance
    return max(zip(weights, instances), key=lambda pair: pair[0])[1]  # Rounding has left nothing.


def cost_weights(
    costs: Sequence[float], powers: tuple[float, float] = (0.0, 0.0), progress: float = 0.0
) -> tuple[float, ...]:
    """Computes weights that are powers of costs: above 0 they favour the expensive, below 0 the cheap instances.

    Args:
        costs: of the instances, as MACs.
        powers: at the first and at the last step; between them it changes in proportion to the steps.
        progress: share of the steps that are done, in 0..1.
    """
    power = powers[0] + (powers[1] - powers[0]) * progress
    favoured = max(costs) if power > 0 else min(costs)
    return tuple((cost / favoured) ** power for cost in costs)


SAMPLINGS = {"uniform": uniform_sampling, "legacy": legacy_sampling}
WEIGHTED = ("weighted", "cost")  # Samplings that need weights.


def check_sampling(sampling: str, instances: Sequence[SDPointInstance], weights: Sequence[float] | None = None) -> None:
    """Raises ValueError for an unknown sampling, or one that cannot draw from `instances`."""
    if not instances:
        raise ValueError("no instances to draw from")
    if sampling not in (*SAMPLINGS, *WEIGHTED):
        raise ValueError(f"sampling {sampling!r}: valid are {', '.join((*SAMPLINGS, *WEIGHTED))}")
    if sampling == "legacy" and FULL_RESOLUTION not in instances:
        raise ValueError("legacy sampling draws full resolution instead of block 1: it must be among the instances")
    if weights is not None:
        check_weights(weights, instances)


def check_weights(weights: Sequence[float], instances: Sequence[SDPointInstance]) -> None:
    """Raises ValueError unless there is a weight of at least 0 for each instance, and one above 0."""
    given = tuple(weights)
    if len(given) != len(instances):
        names = ", ".join(instance.name for instance in instances)
        raise ValueError(f"weights {given}: needs {len(instances)} of them, for {names}")
    if not all(weight >= 0 and math.isfinite(weight) for weight in given) or not sum(given) > 0:
        raise ValueError(f"weights {given}: must be finite, at least 0, and sum to more than 0")


def sample_instance(
    seed: int,
    step: int,
    instances: Sequence[SDPointInstance],
    sampling: str = "uniform",
    weights: Sequence[float] | None = None,
) -> SDPointInstance:
    """Draws the instance of one training step, for the whole global batch (Kuen et al. 2018, section 3.1).

    A pure function of its arguments: the same on every host, after a resume, and on every Python. One instance
    in `instances` makes it the fixed instance: `[FULL_RESOLUTION]` is training without SDPoint.

    Args:
        seed: any integer.
        step: the training step, from 0.
        instances: those to draw from, in a fixed order.
        sampling: `uniform`, the paper's; `legacy`, see `legacy_sampling`; or `weighted` or `cost`, by `weights`.
        weights: of the instances, at this step.

    Raises:
        ValueError: see `check_sampling`.
    """
    check_sampling(sampling, instances, weights)
    # Seeded by a string, Python's generator gives the same `random()` in all versions.
    generator = random.Random(f"sdpoint {operator.index(seed)} {operator.index(step)}")
    if sampling in WEIGHTED:
        if weights is None:
            raise ValueError(f"sampling {sampling!r}: needs weights")
        return weighted_sampling(generator.random, instances, weights)
    return SAMPLINGS[sampling](generator.random, instances)


def sample_set(
    seed: int,
    step: int,
    instances: Sequence[SDPointInstance],
    count: int = 1,
    *,
    always: Sequence[SDPointInstance] = (),
    sampling: str = "uniform",
    weights: Sequence[float] | None = None,
) -> tuple[SDPointInstance, ...]:
    """Draws the instances that one training step trains together, as `sample_instance` draws one.

    One instance is drawn besides those that are trained `always`. Where more are wanted, it brings companions: those
    at even distances from it in the list. So there are at most as many sets, each a program, as instances to draw.

    Args:
        seed, step, sampling: see `sample_instance`.
        instances: all of the run, in a fixed order.
        weights: of all of them; those of the instances that are trained always do not count.
        count: of the instances of a step.
        always: in every set; fewer than `count`, or as many, and then nothing is drawn.

    Returns:
        the set, in the order of `instances`.
    """
    others = _others(instances, always)
    if count == len(always):
        return _ordered(always, instances)
    if weights is not None:
        weights = [weight for instance, weight in zip(instances, weights, strict=True) if instance in others]
    drawn = sample_instance(seed, step, others, sampling, weights)
    return _ordered((*always, *_with_companions(drawn, others, count - len(always))), instances)


def list_sets(
    instances: Sequence[SDPointInstance], count: int = 1, always: Sequence[SDPointInstance] = ()
) -> tuple[tuple[SDPointInstance, ...], ...]:
    """Lists the sets that `sample_set` can draw, by the same arguments."""
    others = _others(instances, always)
    if count == len(always):
        return (_ordered(always, instances),)
    drawn = (_with_companions(instance, others, count - len(always)) for instance in others)
    return tuple(dict.fromkeys(_ordered((*always, *group), instances) for group in drawn))


def _others(instances, always):
    return [instance for instance in instances if instance not in always]


def _ordered(chosen, instances):
    return tuple(instance for instance in instances if instance in chosen)


def _with_companions(drawn, others, count):
    """Returns `count` of the others, `drawn` among them, at even distances in the ring that they form."""
    first, size = others.index(drawn), len(others)
    return [others[(first + index * size // count) % size] for index in range(count)]


def set_name(instances: Sequence[SDPointInstance]) -> str:
    """Names a set by its instances, as `full+p01_r0.50`."""
    return "+".join(instance.name for instance in instances)
