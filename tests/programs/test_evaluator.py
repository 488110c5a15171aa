import chex
import jax
import numpy as np
import pytest
import tiny

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.evaluator import Evaluator

BATCH = 16
DEVICES = 8


@pytest.fixture(scope="module")
def model():
    return tiny.net()


@pytest.fixture(scope="module")
def params(model):
    return tiny.variables(model)["params"]


@pytest.fixture(scope="module")
def evaluator(model):
    return Evaluator(
        model, model.instances(), image_shape=tiny.IMAGE_SHAPE, batch_size=BATCH, preprocess=tiny.preprocess
    )


@pytest.fixture(scope="module")
def batches():
    masks = [np.ones(BATCH, np.float32), np.arange(BATCH) < 5]
    return [tiny.batch(BATCH, seed) | {"mask": mask.astype(np.float32)} for seed, mask in enumerate(masks)]


@pytest.fixture(scope="module")
def statistics(evaluator, params, batches):
    return evaluator.reestimate(params, batches)


def brute_force_statistics(model, params, batches, instance):
    """Pools in NumPy and float64 what each device's share of each batch gives when the whole net runs on it."""

    @jax.jit
    def apply(images):
        """Batch statistics, from moving averages of momentum 0.99 that begin with mean 0 and variance 1."""
        x = tiny.preprocess(images)
        _, updated = model.apply({"params": params}, x, instance=instance, train=True, mutable=["batch_stats"])
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (leaf - 0.99 * (path[-1].key == "var")) / 0.01, updated["batch_stats"]
        )

    shares = [share for batch in batches for share in np.split(batch["images"], DEVICES)]
    found = [jax.tree.map(lambda x: np.asarray(x, np.float64), apply(share)) for share in shares]

    def pool(*parts):
        if "mean" not in parts[0]:
            return {name: pool(*(part[name] for part in parts)) for name in parts[0]}
        means, variances = (np.stack([part[name] for part in parts]) for name in ("mean", "var"))
        mean = means.mean(0)
        return {"mean": mean, "var": (variances + means**2).mean(0) - mean**2}

    return pool(*found)


@pytest.mark.parametrize("name", ["full", "p01_r0.50", "p02_r0.75", "p03_r0.50"])
def test_reestimated_statistics_are_the_pooled_moments_of_all_images(model, params, batches, statistics, name):
    instance = SDPointInstance.from_name(name)
    expected = brute_force_statistics(model, params, batches, instance)
    chex.assert_trees_all_equal_structs(statistics[instance], expected)
    # Few values per channel are left after an early point: rounding, of two programs, grows with every normalisation.
    chex.assert_trees_all_close(statistics[instance], expected, rtol=5e-4, atol=1e-5)


def test_layers_before_the_point_have_the_statistics_of_full_resolution(statistics):
    full, early = statistics[FULL_RESOLUTION], statistics[SDPointInstance(2, 0.5)]
    for block in ("block_01", "block_02"):
        chex.assert_trees_all_equal(full[block], early[block])
    assert np.any(full["block_03"]["norm1"]["mean"] != early["block_03"]["norm1"]["mean"])


def test_metrics_are_those_of_each_whole_net_by_itself(model, params, evaluator, batches, statistics):
    results = evaluator.evaluate(params, statistics, batches)
    assert list(results) and set(results) == set(model.instances())
    for instance, found in results.items():
        variables = {"params": params, "batch_stats": statistics[instance]}
        images = np.concatenate([batch["images"] for batch in batches])
        labels = np.concatenate([batch["labels"] for batch in batches])
        used = np.concatenate([batch["mask"] for batch in batches]) > 0
        logits = np.asarray(model.apply(variables, tiny.preprocess(images), instance=instance, train=False))[used]
        ranks = (-logits).argsort(1)
        assert found.count == used.sum() == BATCH + 5
        assert found.top1 == pytest.approx((ranks[:, 0] == labels[used]).mean())
        assert found.top5 == pytest.approx((ranks[:, :5] == labels[used, None]).any(1).mean())
        assert found.loss == pytest.approx(float(cross_entropy(logits, labels[used]).mean()), rel=1e-4)


def test_a_subset_gives_what_all_instances_give(model, params, batches, statistics):
    subset = (SDPointInstance(2, 0.75), SDPointInstance(1, 0.5))
    some = Evaluator(model, subset, image_shape=tiny.IMAGE_SHAPE, batch_size=BATCH, preprocess=tiny.preprocess)
    found = some.reestimate(params, batches)
    assert set(found) == set(subset)
    for instance in subset:
        chex.assert_trees_all_close(found[instance], statistics[instance], rtol=1e-6)


def test_top5_is_left_out_where_it_means_nothing(batches):
    model = create_model("wrn10_1", 5)
    params = tiny.variables(model)["params"]
    some = Evaluator(
        model, [FULL_RESOLUTION], image_shape=tiny.IMAGE_SHAPE, batch_size=BATCH, preprocess=tiny.preprocess
    )
    five = [batch | {"labels": batch["labels"] % 5} for batch in batches]
    assert some.evaluate(params, some.reestimate(params, five), five)[FULL_RESOLUTION].top5 is None


def test_an_instance_without_statistics_is_an_error(params, evaluator, batches, statistics):
    lacking = {instance: found for instance, found in statistics.items() if instance.point != 2}
    with pytest.raises(ValueError, match="no re-estimated statistics for p02_r0.50, p02_r0.75"):
        evaluator.evaluate(params, lacking, batches)


def test_statistics_of_another_reestimation_are_refused_before_a_shared_point(params, evaluator, batches, statistics):
    early = SDPointInstance(2, 0.5)
    moved = jax.tree.map(lambda x: x + 1e-3, statistics[early])
    with pytest.raises(ValueError, match="statistics of p02_r0.50 and full differ before the point .* separately"):
        evaluator.evaluate(params, statistics | {early: moved}, batches)


def test_no_examples_are_an_error(params, evaluator, batches, statistics):
    masked = [batch | {"mask": np.zeros_like(batch["mask"])} for batch in batches]
    with pytest.raises(ValueError, match="no examples to evaluate: .*config.dataset.on_bad_image"):
        evaluator.evaluate(params, statistics, masked)


def test_nothing_to_reestimate_from_is_an_error(params, evaluator):
    with pytest.raises(ValueError, match="no batches"):
        evaluator.reestimate(params, [])


def test_an_instance_the_net_does_not_have_is_an_error(model):
    with pytest.raises(ValueError, match="no point 4; it has 0 .full resolution. and 1 to 3"):
        Evaluator(
            model, [SDPointInstance(4, 0.5)], image_shape=tiny.IMAGE_SHAPE, batch_size=8, preprocess=tiny.preprocess
        )
