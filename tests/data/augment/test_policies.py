"""TrivialAugment and RandAugment: which operations, how strong, how often."""

import numpy as np
import pytest
from scipy import stats

from sdpoint_jax.data.augment import policies

IMAGE = np.zeros((32, 40, 1), np.uint8)


def recorded(monkeypatch, choices):
    """Replaces the operations by ones that take down their number and magnitude."""
    calls = []

    def recorder(number):
        def operation(image, magnitude):
            calls.append((number, magnitude))
            return image

        return operation

    names = [(recorder(number), *rest) for number, (_, *rest) in enumerate(choices)]
    monkeypatch.setattr(policies, "TRIVIAL_CHOICES", names)
    monkeypatch.setattr(policies, "rand_choices", lambda size: names)
    return calls


def apply_often(augmentation, times):
    for row in augmentation.draw(np.random.default_rng(1), times):
        augmentation.apply(IMAGE, row, IMAGE.shape[:2])


def test_trivial_augment_chooses_operation_magnitude_and_sign_uniformly(monkeypatch):
    calls = recorded(monkeypatch, policies.TRIVIAL_CHOICES)
    apply_often(policies.trivial_augment(), 14 * 31 * 30)
    counts = np.bincount([number for number, _ in calls], minlength=14)
    assert counts.sum() == 14 * 31 * 30 and stats.chisquare(counts).pvalue > 0.001
    for number, (_, magnitudes, signed) in enumerate(policies.TRIVIAL_CHOICES):
        found = [magnitude for other, magnitude in calls if other == number]
        values, counts = np.unique(np.abs(found), return_counts=True)
        assert sorted(values) == sorted(set(magnitudes))
        if len(values) > 1:
            shares = np.array([magnitudes.count(value) for value in values])
            assert stats.chisquare(counts, shares * len(found) / policies.BINS).pvalue > 0.001
        nonzero = [magnitude for magnitude in found if magnitude]
        negative = sum(magnitude < 0 for magnitude in nonzero)
        if signed:
            assert stats.binomtest(negative, len(nonzero)).pvalue > 0.001
        else:
            assert negative == 0


@pytest.mark.parametrize("num_ops, magnitude", [(1, 0), (2, 9), (3, 30)])
def test_rand_augment_applies_so_many_operations_of_one_magnitude(num_ops, magnitude, monkeypatch):
    choices = policies.rand_choices((32, 40))
    calls = recorded(monkeypatch, choices)
    apply_often(policies.rand_augment(num_ops, magnitude), 1400)
    assert len(calls) == 1400 * num_ops
    assert stats.chisquare(np.bincount([number for number, _ in calls])).pvalue > 0.001
    for number, (_, magnitudes, signed) in enumerate(choices):
        found = {value for other, value in calls if other == number}
        assert found == ({magnitudes[magnitude], -magnitudes[magnitude]} if signed else {magnitudes[magnitude]})


def test_rand_augment_moves_in_proportion_to_the_image(monkeypatch):
    horizontal, vertical = policies.rand_choices((331, 662))[3:5]
    assert horizontal[1][-1] == pytest.approx(300) and vertical[1][-1] == pytest.approx(150)


def test_magnitudes_are_even_and_round_as_torchs_do():
    """A CPU with fused multiply-add rounds once where NumPy would round twice: the 16th of 0 to 32 is not 16."""
    found = policies.magnitudes(0.0, 32.0)
    np.testing.assert_allclose(found, np.linspace(0, 32, 31), rtol=1e-6)
    assert (found[0], found[-1]) == (0.0, 32.0) and int(found[15]) == 15
    assert all(float(np.float32(magnitude)) == magnitude for magnitude in found)


def test_operations_follow_each_other(monkeypatch):
    steps = [(lambda image, _: image + 1, (0.0,) * 31, False), (lambda image, _: image * 2, (0.0,) * 31, False)]
    monkeypatch.setattr(policies, "rand_choices", lambda size: steps)
    first_then_second = np.array([0.1, 0.0, 0.9, 0.0])
    assert (policies.rand_augment().apply(IMAGE, first_then_second, IMAGE.shape[:2]) == 2).all()


def test_numbers_just_below_one_are_the_last_choice_and_magnitude(monkeypatch):
    calls = recorded(monkeypatch, policies.TRIVIAL_CHOICES)
    last = np.nextafter(1.0, 0.0)
    for choice in (0.0, last):
        policies.trivial_augment().apply(IMAGE, np.array([choice, last, last]), IMAGE.shape[:2])
    assert calls == [(0, 0.0), (13, 0.0)]


@pytest.mark.parametrize("num_ops, magnitude", [(0, 9), (2, -1), (2, 31)])
def test_impossible_settings_of_rand_augment_name_the_valid_ones(num_ops, magnitude):
    with pytest.raises(ValueError, match="num_ops 0: at least 1|magnitude (-1|31): valid are 0 to 30"):
        policies.rand_augment(num_ops, magnitude)
