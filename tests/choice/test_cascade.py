"""Cascades: the arithmetic agrees with the definition, image by image, and with all thresholds tried one by one."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from sdpoint_jax.choice import cascade as cascades
from sdpoint_jax.choice.cascade import Cascade, CascadeRow, Measured
from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance

EARLY, LATE = SDPointInstance(1, 0.5), SDPointInstance(2, 0.5)
PAIR, TRIPLE = (EARLY, FULL_RESOLUTION), (EARLY, LATE, FULL_RESOLUTION)
COSTS = {PAIR: (30, 70), TRIPLE: (30, 40, 60)}  # Of each stage for an image that reaches it.


def example(stages, n=40, seed=0):
    """Logits of each stage, later ones more accurate, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    sharpness = np.linspace(1.0, 2.5, len(stages))
    logits = [rng.normal(size=(n, 4)) + s * np.eye(4)[labels] for s in sharpness]
    return [found.astype(np.float32) for found in logits], labels


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_definition(cascade, logits, costs):
    """Runs a cascade on one image after the other: (logits, stage, cost) of each."""
    for image in range(len(logits[0])):
        seen = []
        for stage, found in enumerate(logits):
            seen.append(found[image])
            answer = np.mean(seen, 0) if cascade.average else seen[-1]
            first, second = np.sort(softmax(answer))[::-1][:2]
            sure = first if cascade.confidence == "max_probability" else first - second
            if stage == len(cascade.thresholds) or sure >= cascade.thresholds[stage]:
                yield answer, stage, sum(costs[: stage + 1])
                break


@pytest.mark.parametrize("stages", [PAIR, TRIPLE])
@pytest.mark.parametrize("kind", cascades.CONFIDENCES)
@pytest.mark.parametrize("average", [False, True])
def test_a_run_is_what_the_definition_gives_image_by_image(stages, kind, average):
    logits, labels = example(stages)
    cascade = Cascade(stages, (0.6, 0.4)[: len(stages) - 1], kind, average)
    answers, reached, costs = zip(*by_definition(cascade, logits, COSTS[stages]))
    found = cascade.run(logits)
    assert set(reached) == set(range(len(stages)))
    np.testing.assert_allclose(found.logits, answers, rtol=1e-6)
    np.testing.assert_array_equal(found.stages, reached)
    assert cascades.mean_cost(found.stages, COSTS[stages]) == pytest.approx(np.mean(costs))
    measured = Measured.from_tally(cascade.tally(logits, labels), COSTS[stages])
    assert measured.mean_macs == pytest.approx(np.mean(costs)) and measured.n == len(labels)
    assert measured.top1 == np.mean(np.argmax(answers, -1) == labels)
    assert measured.shares == tuple(np.bincount(reached) / len(labels))


@pytest.mark.parametrize("stages, n", [(PAIR, 40), (TRIPLE, 14)])
@pytest.mark.parametrize("kind", cascades.CONFIDENCES)
@pytest.mark.parametrize("average", [False, True])
def test_calibration_finds_what_trying_all_thresholds_finds(stages, n, kind, average):
    logits, labels = example(stages, n, seed=3)
    answers = [np.mean(logits[: stage + 1], 0) if average else logits[stage] for stage in range(len(stages))]
    values = [np.unique([0.0, *cascades.confidence(answer, kind), 1.0]) for answer in answers[:-1]]
    tried = [Cascade(stages, thresholds, kind, average) for thresholds in itertools.product(*values)]
    every = [Measured.from_tally(cascade.tally(logits, labels), COSTS[stages]) for cascade in tried]
    targets = (29, 30, 35, 52, 71, 100, 200)
    found = cascades.calibrate(stages, logits, labels, COSTS[stages], targets, kinds=[kind], averages=[average])
    assert found[0] is None  # The first stage alone costs more.
    for target, (cascade, macs, top1) in zip(targets[1:], found[1:]):
        within = [measured for measured in every if measured.mean_macs <= target]
        best = max(within, key=lambda measured: (measured.top1, -measured.mean_macs))
        measured = Measured.from_tally(cascade.tally(logits, labels), COSTS[stages])
        assert (measured.top1, measured.mean_macs) == (best.top1, pytest.approx(best.mean_macs))
        assert (top1, macs) == (pytest.approx(best.top1), pytest.approx(best.mean_macs))


def test_the_best_kind_of_confidence_and_averaging_are_taken():
    logits, labels = example(TRIPLE, 300, seed=1)
    targets = np.linspace(30, 130, 11)

    def accuracies(**kwargs):
        found = cascades.calibrate(TRIPLE, logits, labels, COSTS[TRIPLE], targets, **kwargs)
        return [calibrated.top1 for calibrated in found]

    each = [
        accuracies(kinds=[kind], averages=[average])
        for kind, average in itertools.product(cascades.CONFIDENCES, (False, True))
    ]
    assert accuracies() == np.max(each, 0).tolist()
    assert accuracies()[-1] > accuracies(averages=[False])[-1]  # Three nets together are better than the last one.


def test_a_curve_ascends_and_its_thresholds_give_what_it_says():
    logits, labels = example(TRIPLE, 200)
    found = cascades.curve(logits, labels, COSTS[TRIPLE], kind="margin")
    assert len(found.top1) > 5 and (np.diff(found.mean_macs) > 0).all() and (np.diff(found.top1) > 0).all()
    for thresholds, macs, top1 in zip(*found):
        measured = Measured.from_tally(
            Cascade(TRIPLE, thresholds.tolist(), "margin").tally(logits, labels), COSTS[TRIPLE]
        )
        assert (measured.mean_macs, measured.top1) == (pytest.approx(macs), pytest.approx(top1))


def test_a_threshold_of_0_stops_all_images_and_of_1_only_the_certain():
    logits = [np.array([[0, 0], [3, 0], [900, 0]], np.float32)] * 2
    assert Cascade(PAIR, (0,), "margin").run(logits).stages.tolist() == [0, 0, 0]
    assert Cascade(PAIR, (1,), "margin").run(logits).stages.tolist() == [1, 1, 0]


def test_logits_that_are_not_finite_go_on():
    logits = np.array([[np.nan, 0, 1], [np.inf, np.inf, 0], [9, 0, 0]], np.float32)
    assert Cascade(PAIR, (0.1,)).decide([logits])[1].tolist() == [True, True, False]


def test_the_search_finds_the_one_pair_that_works_together():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    sure, hard = 8 * np.eye(3)[labels], np.zeros((400, 3))
    easy = (rng.random(400) < 0.7)[:, None]
    logits = {
        SDPointInstance(1, 0.5): np.where(easy, 2 * np.eye(3)[rng.integers(0, 3, 400)], hard),  # Sure, and wrong.
        SDPointInstance(2, 0.5): np.where(easy, sure, hard),  # Knows what it knows.
        FULL_RESOLUTION: sure,
    }
    macs = {SDPointInstance(1, 0.5): 30, SDPointInstance(2, 0.5): 30, FULL_RESOLUTION: 100}

    def costs_of(stages):
        return [macs[stages[0]], *(0.5 * macs[stage] for stage in stages[1:])]

    best = (SDPointInstance(2, 0.5), FULL_RESOLUTION)
    assert cascades.search(logits, labels, costs_of, [50], max_stages=2) == [best]
    (chosen,) = cascades.calibrate(best, [logits[stage] for stage in best], labels, costs_of(best), [50])
    measured = Measured.from_tally(chosen.cascade.tally([logits[stage] for stage in best], labels), costs_of(best))
    assert measured.top1 == 1 and measured.shares[0] == easy.mean()
    assert all(len(stages) in (2, 3) for stages in cascades.search(logits, labels, costs_of, [40, 50, 60]))


def test_the_search_is_as_good_as_calibrating_every_combination():
    rng = np.random.default_rng(5)
    n, order = 120, (SDPointInstance(STEM, 0.5), EARLY, SDPointInstance(1, 0.75), LATE, FULL_RESOLUTION)
    labels = rng.integers(0, 4, n)
    shared = rng.normal(size=(n, 4))
    logits = {
        instance: shared + rng.normal(size=(n, 4)) + (1 + 0.4 * k) * np.eye(4)[labels]
        for k, instance in enumerate(order)
    }
    macs = dict(zip(order, (20, 35, 50, 70, 100)))

    def costs_of(stages):
        return [macs[stages[0]], *(0.6 * macs[stage] for stage in stages[1:])]

    def top1(stages):
        some = [logits[stage] for stage in stages]
        chosen = cascades.calibrate(stages, some, labels, costs_of(stages), [60], kinds=["max_probability"])
        return chosen[0].top1 if chosen[0] else 0

    found = max(top1(stages) for stages in cascades.search(logits, labels, costs_of, [60]))
    every = max(top1(stages) for size in (2, 3) for stages in itertools.combinations(order, size))
    assert found >= every - 0.02  # The search compares fewer thresholds, without averaging.


@pytest.mark.parametrize(
    "stages, values, message",
    [
        ((EARLY,), ((),), r"cascade p01_r0.50: give at least two stages"),
        ((), ((),), r"cascade \(\): give at least two stages"),
        ((EARLY, EARLY), ((0.5,),), "cascade p01_r0.50.p01_r0.50: each stage can be there once"),
        ((LATE, EARLY), ((0.5,),), "p01_r0.50 cannot go on from the prefix of p02_r0.50, which is longer; valid are"),
        ((FULL_RESOLUTION, LATE), ((0.5,),), "p02_r0.50 cannot go on from the prefix of full"),
        ((EARLY, SDPointInstance(STEM, 0.5)), ((0.5,),), "stem_r0.50 cannot go on from the prefix of p01_r0.50"),
        (PAIR, ((0.5, 0.5),), r"thresholds \(0.5, 0.5\): cascade p01_r0.50.full needs 1, one for each stage but"),
        (PAIR, ((1.5,),), r"threshold 1.5: valid are confidences in 0..1"),
        (PAIR, ((float("nan"),),), r"threshold nan: valid are confidences in 0..1"),
        (PAIR, (("0.5",),), r"threshold '0.5': valid are confidences in 0..1"),
        (PAIR, ((0.5,), "entropy"), "confidence 'entropy': valid are max_probability, margin"),
        (PAIR, ((0.5,), "margin", 1), "average 1: valid are True and False"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused_in_one_line(stages, values, message):
    with pytest.raises(ValueError, match=message) as raised:
        Cascade(stages, *values)
    assert "\n" not in str(raised.value)


def test_two_instances_of_one_point_may_follow_each_other():
    assert Cascade((EARLY, SDPointInstance(1, 0.75)), (0.5,)).name == "p01_r0.50+p01_r0.75"


def test_stages_are_found_by_their_name():
    assert cascades.stages_from_name("p01_r0.50+p02_r0.50 + full") == TRIPLE
    with pytest.raises(ValueError, match="instance name 'half': valid are full"):
        cascades.stages_from_name("half+full")
    with pytest.raises(ValueError, match="cascade full: give at least two stages"):
        cascades.stages_from_name("full")


def row(macs, top1, evaluated_macs=None, evaluated_top1=0.5):
    measured = Measured(evaluated_macs or macs, evaluated_top1, 50, (0.25, 0.75))
    return CascadeRow(Cascade(PAIR, (0.5,)), (30, 70), "validation", Measured(macs, top1, 20, (0.25, 0.75)), measured)


def test_a_row_is_read_as_it_was_written():
    written = row(60, 0.9)
    assert CascadeRow.from_record(json.loads(json.dumps(written.to_record()))) == written
    with pytest.raises(ValueError, match="not the record of a CascadeRow: .*calibration"):
        CascadeRow.from_record({"cascade": written.cascade.to_record()})
    with pytest.raises(ValueError, match="not the record of a Cascade: .*treshold"):
        Cascade.from_record({"stages": ["p01_r0.50", "full"], "treshold": [0.5]})


def test_the_cascade_for_a_mean_cost_is_chosen_by_what_calibration_says():
    # The most accurate one on the evaluated images is the first, which calibration does not know.
    rows = [row(40, 0.7, 42, 0.99), row(60, 0.8, 63, 0.6), row(80, 0.85, 85, 0.7), row(70, 0.85, 70, 0.7)]
    picked = [cascades.select_cascade(rows, budget) for budget in (42, 62.9, 63, 70, 1e9)]
    assert picked == [rows[0], rows[0], rows[1], rows[3], rows[3]]
    assert cascades.pareto_front(rows) == [rows[0], rows[1], rows[3]]
    with pytest.raises(ValueError, match="mean_macs 41: the cheapest cascade, p01_r0.50.full, needs 42 MACs"):
        cascades.select_cascade(rows, 41)
    with pytest.raises(ValueError, match="no cascades: evaluate.py --cascades=auto"):
        cascades.select_cascade([], 41)
    assert cascades.pareto_front([]) == []


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), True, "1"])
def test_a_mean_cost_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="mean_macs .*: valid are positive, finite numbers"):
        cascades.select_cascade([row(40, 0.7)], budget)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="no images to measure a cascade on"):
        Measured.from_tally(np.zeros((2, 2), int), (1, 2))


def test_logits_of_other_stages_are_refused():
    with pytest.raises(ValueError, match="logits of 3 stages: cascade p01_r0.50.full has 2"):
        Cascade(PAIR, (0.5,)).run([np.zeros((1, 2))] * 3)


def test_the_arithmetic_needs_no_jax():
    code = "import sys, sdpoint_jax.choice.cascade; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
