"""SDPoint instances, their names, the set of them and the draw."""

import collections
import dataclasses
import subprocess
import sys

import pytest

from sdpoint_jax.instance import (
    FULL_RESOLUTION,
    STEM,
    SDPointInstance,
    cost_weights,
    list_instances,
    list_sets,
    sample_instance,
    sample_set,
    set_name,
)
from sdpoint_jax.models.registry import create_model

DRAWS = 50_000
BASIC, BOTTLENECK = "wrn16_4", "resnet50"


def _instances(name):
    return create_model(name, num_classes=10).instances()


def test_an_instance_is_a_frozen_hashable_value():
    instance = SDPointInstance(3, 0.5)
    assert instance == SDPointInstance(3, 0.5) != SDPointInstance(3, 0.75)
    assert {instance: "program"}[SDPointInstance(3, 0.5)] == "program"
    with pytest.raises(dataclasses.FrozenInstanceError):
        instance.point = 4


@pytest.mark.parametrize(
    "instance, name",
    [
        (FULL_RESOLUTION, "full"),
        (SDPointInstance(STEM, 0.5), "stem_r0.50"),
        (SDPointInstance(5, 0.75), "p05_r0.75"),
        (SDPointInstance(110, 0.625), "p110_r0.625"),
        (SDPointInstance(1, 1 / 3), "p01_r0.3333333333333333"),
        (SDPointInstance(1, 1e-5), "p01_r1e-05"),
    ],
)
def test_names_and_instances_are_each_others_inverse(instance, name):
    assert instance.name == str(instance) == name
    assert SDPointInstance.from_name(name) == instance


@pytest.mark.parametrize("name", ["", "Full", "p05", "p5_r", "p05_r0.75 ", "stem_r1.50", "p00_r0.50", "p-1_r0.50"])
def test_another_name_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match="instance name|ratio|point"):
        SDPointInstance.from_name(name)


@pytest.mark.parametrize(
    "point, ratio, message",
    [
        (3, 1.0, r"ratio 1.0 at point 3: .* \(0, 1\)"),
        (3, 0.0, r"ratio 0.0 at point 3: .* \(0, 1\)"),
        (3, float("nan"), r"ratio nan at point 3"),
        (STEM, 1.5, r"ratio 1.5 at point -1"),
        (0, 0.5, "ratio 0.5 at point 0: full resolution has ratio 1.0"),
        (-2, 0.5, "point -2: valid are -1"),
        (1.5, 0.5, "point 1.5"),
        ("a", 0.5, "point 'a'"),
        (1, "half", "ratio 'half'"),
    ],
)
def test_an_impossible_instance_is_an_error_that_names_the_value(point, ratio, message):
    with pytest.raises(ValueError, match=message):
        SDPointInstance(point, ratio)


@pytest.mark.parametrize(
    "blocks, has_stem_point, count", [(16, True, 35), (33, True, 69), (50, True, 103), (12, False, 25)]
)
def test_a_net_has_full_resolution_and_two_ratios_at_every_point(blocks, has_stem_point, count):
    # 1 + 2(N + 1) instances with an ImageNet stem, 1 + 2N without.
    instances = list_instances(blocks, has_stem_point=has_stem_point)
    assert len(instances) == len(set(instances)) == count == 1 + 2 * (blocks + has_stem_point)


def test_instances_are_listed_by_depth_and_ascending_ratio():
    names = [instance.name for instance in list_instances(2, has_stem_point=True, ratios=[0.75, 0.5])]
    assert names == ["full", "stem_r0.50", "stem_r0.75", "p01_r0.50", "p01_r0.75", "p02_r0.50", "p02_r0.75"]


def test_points_and_ratios_can_be_a_subset():
    chosen = list_instances(9, has_stem_point=False, points=[7, 0, 2], ratios=[0.6])
    assert [instance.name for instance in chosen] == ["full", "p02_r0.60", "p07_r0.60"]
    assert list_instances(9, has_stem_point=False, points=[0], ratios=[]) == (FULL_RESOLUTION,)


@pytest.mark.parametrize(
    "has_stem_point, settings, message",
    [
        (True, {"points": [4]}, r"points \[4\]: the net has -1 \(stem\), 0 \(full resolution\) and 1 to 3"),
        (False, {"points": [STEM]}, r"points \[-1\]: the net has 0 \(full resolution\) and 1 to 3"),
        (True, {"points": []}, "no downsampling points"),
        (True, {"ratios": []}, "no downsampling ratios"),
        (True, {"ratios": [0.5, 1.25]}, r"ratio 1.25 at point -1: .* \(0, 1\)"),
    ],
)
def test_a_point_or_ratio_that_the_net_lacks_is_an_error(has_stem_point, settings, message):
    with pytest.raises(ValueError, match=message):
        list_instances(3, has_stem_point=has_stem_point, **settings)


@pytest.mark.parametrize("name", [BASIC, BOTTLENECK])
def test_the_draw_is_uniform_over_points_and_over_the_ratios_of_a_point(name):
    instances = _instances(name)
    counts = collections.Counter(sample_instance(0, step, instances) for step in range(DRAWS))
    points = {instance.point for instance in instances}
    assert 1 in points and set(counts) == set(instances)
    expected = {i: DRAWS / len(points) / (1 if i.point == 0 else 2) for i in instances}
    assert _chi_square(counts, expected) < _limit(len(instances) - 1)
    by_point = collections.Counter()
    for instance, count in counts.items():
        by_point[instance.point] += count
    assert _chi_square(by_point, dict.fromkeys(points, DRAWS / len(points))) < _limit(len(points) - 1)


@pytest.mark.parametrize("name", [BASIC, BOTTLENECK])
def test_the_legacy_draw_never_takes_block_1_and_takes_full_resolution_twice_as_often(name):
    instances = _instances(name)
    counts = collections.Counter(sample_instance(0, step, instances, "legacy") for step in range(DRAWS))
    points = len({instance.point for instance in instances})
    expected = {i: DRAWS / points / (1 / 2 if i.point == 0 else 2) for i in instances if i.point != 1}
    assert set(counts) == set(expected)
    assert _chi_square(counts, expected) < _limit(len(expected) - 1)


def test_the_legacy_draw_is_the_uniform_one_but_for_block_1():
    instances = _instances(BOTTLENECK)
    for step in range(200):
        drawn = sample_instance(7, step, instances)
        expected = FULL_RESOLUTION if drawn.point == 1 else drawn
        assert sample_instance(7, step, instances, "legacy") == expected


def test_the_draw_depends_on_seed_and_step_alone():
    instances = _instances(BOTTLENECK)
    forward = [sample_instance(3, step, instances) for step in range(100)]
    backward = [sample_instance(3, step, instances) for step in reversed(range(100))]
    assert forward == backward[::-1]
    assert forward != [sample_instance(4, step, instances) for step in range(100)]


def test_the_draw_is_the_same_in_every_process_and_version():
    # Literals: a change here would change every run that is resumed.
    instances = list_instances(9, has_stem_point=False)
    drawn = [sample_instance(0, step, instances).name for step in range(6)]
    assert drawn == ["p03_r0.75", "p06_r0.75", "p05_r0.50", "p02_r0.75", "p03_r0.75", "p05_r0.50"]


def test_a_single_instance_is_always_drawn():
    fixed = [SDPointInstance(4, 0.5)]
    assert {sample_instance(0, step, fixed) for step in range(20)} == set(fixed)


def test_draws_outside_of_the_settings_are_errors():
    with pytest.raises(ValueError, match="no instances"):
        sample_instance(0, 0, [])
    with pytest.raises(ValueError, match="sampling 'paper': valid are uniform, legacy, weighted, cost"):
        sample_instance(0, 0, [FULL_RESOLUTION], "paper")
    with pytest.raises(ValueError, match="legacy sampling .*full resolution"):
        sample_instance(0, 0, [SDPointInstance(1, 0.5)], "legacy")


def test_weights_are_the_probabilities_of_a_draw():
    instances = _instances(BASIC)[:4]
    weights = (1.0, 0.0, 3.0, 4.0)
    counts = collections.Counter(sample_instance(0, step, instances, "weighted", weights) for step in range(DRAWS))
    expected = {i: DRAWS * weight / 8 for i, weight in zip(instances, weights) if weight}
    assert set(counts) == set(expected) and _chi_square(counts, expected) < _limit(2)
    pair = [
        sample_set(0, step, instances, 2, always=instances[:1], sampling="weighted", weights=weights)
        for step in range(999)
    ]
    assert {drawn[1] for drawn in pair} == {instances[2], instances[3]}


def test_powers_of_costs_favour_the_cheap_at_first_and_full_resolution_at_last():
    costs = (8.0, 2.0, 4.0)
    assert cost_weights(costs) == (1.0, 1.0, 1.0)
    assert cost_weights(costs, (1.0, 1.0)) == (1.0, 0.25, 0.5)
    assert cost_weights(costs, (-1.0, 1.0), 0.0) == (0.25, 1.0, 0.5)
    assert cost_weights(costs, (-1.0, 1.0), 0.5) == (1.0, 1.0, 1.0)
    assert cost_weights(costs, (-1.0, 1.0), 1.0) == (1.0, 0.25, 0.5)
    assert sum(cost_weights((1e12, 1.0), (100.0, 100.0))) == sum(cost_weights((1e12, 1.0), (-100.0, 0.0))) == 1.0


@pytest.mark.parametrize(
    "weights, message",
    [
        ((1.0,), r"weights \(1.0,\): needs 2 of them, for full, p01_r0.50"),
        ((0.0, 0.0), "must be finite, at least 0, and sum to more than 0"),
        ((2.0, -1.0), "must be finite, at least 0"),
        ((float("inf"), 1.0), "must be finite"),
        (None, "sampling 'weighted': needs weights"),
    ],
)
def test_weights_that_cannot_be_drawn_by_are_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        sample_instance(0, 0, _instances(BASIC)[:2], "weighted", weights)


def test_a_set_of_one_is_the_draw_of_one():
    instances = _instances(BASIC)
    for step in range(100):
        assert sample_set(3, step, instances) == (sample_instance(3, step, instances),)
    assert list_sets(instances) == tuple((instance,) for instance in instances)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("name", [BASIC, BOTTLENECK])
def test_sets_are_as_many_as_instances_and_hold_what_they_should(name, count):
    instances = _instances(name)
    always = (FULL_RESOLUTION, instances[1])
    sets = list_sets(instances, count, always)
    assert len(sets) == (1 if count == 2 else len(set(sets))) <= len(instances) - 2
    for drawn in sets:
        assert len(set(drawn)) == count and set(always) <= set(drawn)
        assert list(drawn) == [instance for instance in instances if instance in drawn]
    assert {sample_set(0, step, instances, count, always=always) for step in range(2000)} == set(sets)


def test_companions_leave_every_instance_the_same_chance():
    instances = _instances(BASIC)
    counts = collections.Counter(i for s in list_sets(instances, 4, (FULL_RESOLUTION,)) for i in s)
    assert counts.pop(FULL_RESOLUTION) > 0 and len(set(counts.values())) == 1 and len(counts) == len(instances) - 1


def test_a_set_is_named_after_its_instances():
    assert set_name((FULL_RESOLUTION, SDPointInstance(1, 0.5))) == "full+p01_r0.50"


def test_instances_are_known_without_jax():
    code = "import sys, sdpoint_jax.instance; sys.exit(any(m.split('.')[0] in ('jax', 'flax') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _chi_square(counts, expected):
    return sum((counts[key] - value) ** 2 / value for key, value in expected.items())


def _limit(freedom):
    """The chi-square that one draw in a thousand exceeds (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
