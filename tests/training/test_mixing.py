"""Mixed images and their labels are what the papers say, and the same however the batch is divided."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.training.mixing import Mixing, mix
from sdpoint_jax.training.objective import losses_of_set

SIZE = (6, 8)


def images(count):
    return np.random.RandomState(0).standard_normal((count, *SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize("mixing", [Mixing(0.2), Mixing(cutmix=1.0), Mixing(0.4, 1.0)])
def test_an_image_is_mixed_with_its_neighbour_by_the_share_of_its_label(mixing):
    x, labels = images(64), np.arange(64)
    rows = mixing.rows(0, 5, 64, SIZE)
    mixed, others, shares = map(np.asarray, mix(x, labels, rows))
    np.testing.assert_array_equal(others, labels ^ 1)
    partner = x[labels ^ 1]
    for i in range(64):
        kept = (mixed[i] == x[i]).all(-1)
        if rows[i, 0] == 1:  # Cut: each pixel is of the image or of its neighbour.
            assert (kept | (mixed[i] == partner[i]).all(-1)).all()
            np.testing.assert_allclose(shares[i], kept.mean(), rtol=1e-6)
        else:
            expected = rows[i, 0] * x[i] + (1 - rows[i, 0]) * partner[i]
            np.testing.assert_allclose(mixed[i], expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(shares[i], rows[i, 0], rtol=1e-6)
    kinds = {"mixup": (rows[:, 0] < 1).any(), "cutmix": (rows[:, 2] > rows[:, 1]).any()}
    assert kinds == {"mixup": bool(mixing.mixup), "cutmix": bool(mixing.cutmix)}


def test_shares_have_the_papers_distribution():
    shares = Mixing(0.4).rows(0, 0, 40_000, SIZE)[::2, 0]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    np.testing.assert_allclose([shares.mean(), shares.var()], [0.5, 1 / (4 * 1.8)], atol=0.01)
    rows = Mixing(cutmix=1.0).rows(0, 0, 40_000, (100, 100))[::2]
    inside = (rows[:, 1] > 0) & (rows[:, 2] < 100) & (rows[:, 3] > 0) & (rows[:, 4] < 100)
    sides = rows[:, 2] - rows[:, 1], rows[:, 4] - rows[:, 3]
    np.testing.assert_array_equal(sides[0][inside], sides[1][inside])  # A box has the image's aspect, unless cut off.
    assert (rows[:, 1:] >= 0).all() and (rows[:, 1:] <= 100).all()


def test_rows_depend_on_seed_and_step_alone():
    rows = Mixing(0.2, 1.0).rows(3, 7, 32, SIZE)
    np.testing.assert_array_equal(rows, Mixing(0.2, 1.0).rows(3, 7, 32, SIZE))
    np.testing.assert_array_equal(rows[::2], rows[1::2])
    assert (rows != Mixing(0.2, 1.0).rows(3, 8, 32, SIZE)).any() and (
        rows != Mixing(0.2, 1.0).rows(4, 7, 32, SIZE)
    ).any()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_division_of_the_batch_changes_no_mixed_image(parts):
    x, labels, rows = images(16), np.arange(16), Mixing(0.2, 1.0).rows(0, 0, 16, SIZE)
    whole = mix(x, labels, rows)
    divided = [mix(*arrays) for arrays in zip(*(np.split(array, parts) for array in (x, labels, rows)))]
    jax.tree.map(np.testing.assert_array_equal, whole, tuple(map(jnp.concatenate, zip(*divided))))


def test_the_loss_is_that_of_both_labels_by_their_shares():
    logits = jnp.float32(np.random.RandomState(0).standard_normal((4, 5)))
    labels, others, shares = jnp.array([0, 1, 2, 3]), jnp.array([1, 0, 3, 2]), jnp.float32([1.0, 0.25, 0.5, 0.0])
    targets = shares[:, None] * jax.nn.one_hot(labels, 5) + (1 - shares[:, None]) * jax.nn.one_hot(others, 5)
    expected = -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()
    found = losses_of_set({FULL_RESOLUTION: logits}, labels, None, others, shares)[FULL_RESOLUTION]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = losses_of_set({FULL_RESOLUTION: logits}, labels, label_smoothing=0.1)[FULL_RESOLUTION]
    np.testing.assert_allclose(alone, cross_entropy(logits, labels, 0.1).mean(), rtol=1e-6)
