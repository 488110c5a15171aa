"""The method on one screen gives what the package gives."""

import functools
import pathlib
import re

import chex
import jax
import numpy as np
import pytest
import sdpoint as example
import tiny

from sdpoint_jax.choice.selection import Budget, select
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance, sample_instance
from sdpoint_jax.profiling.macs import count_cost
from sdpoint_jax.programs import devices
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.training import step as steps

INSTANCE = SDPointInstance(1, 0.75)
DEVICES = 8  # Each normalises its own images, so one batch of the package's is eight of the example's.


def preprocess(images):
    return images.astype(np.float32) / 255


@pytest.fixture(scope="module")
def model():
    return example.Net(num_classes=10, sizes=((4, 1), (6, 2)))


@pytest.fixture(scope="module")
def params(model):
    return tiny.variables(model)["params"]


def test_it_fits_on_one_screen_and_needs_the_contract_alone():
    text = pathlib.Path(example.__file__).read_text()
    assert len(text.splitlines()) <= 150
    assert set(re.findall(r"^(?:from|import) (sdpoint_jax\S*.*)$", text, re.M)) == {"sdpoint_jax import SDPointNet"}


def test_it_draws_as_the_package_does(model):
    for seed in (0, 7):
        drawn = [example.draw(seed, step, model.instances()) for step in range(200)]
        assert drawn == [sample_instance(seed, step, model.instances()) for step in range(200)]
        assert set(drawn) == set(model.instances())


@pytest.mark.parametrize("image_size", [(8, 8), (22, 9)])  # The pool of 22 rows to 16 is a matrix product.
def test_it_counts_as_the_package_does(model, image_size):
    images = jax.ShapeDtypeStruct((1, *image_size, 3), np.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    for instance in model.instances():
        forward = functools.partial(model.apply, instance=instance, train=False)
        macs = example.count_macs(jax.make_jaxpr(forward)(variables, images).jaxpr)
        assert macs == count_cost(model, instance, image_size, channels=3).macs


def test_it_reestimates_as_the_package_does(model, params):
    batches = [tiny.batch(DEVICES * 4, seed) for seed in range(2)]
    evaluator = Evaluator(
        model, [INSTANCE], image_shape=tiny.IMAGE_SHAPE, batch_size=DEVICES * 4, preprocess=preprocess
    )
    expected = evaluator.reestimate(params, batches)[INSTANCE]
    parts = [part for batch in batches for part in np.split(preprocess(batch["images"]), DEVICES)]
    chex.assert_trees_all_close(example.reestimate(params, parts, model, INSTANCE), expected, rtol=1e-5, atol=1e-6)


def test_its_gradient_is_that_of_the_package(model, params):
    batch = tiny.batch(4)
    step = functools.partial(steps.gradient_step, model=model, instances=(INSTANCE,), preprocess=preprocess)
    on_one = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=devices.AXIS)
    control = steps.Control(*np.zeros((3, 1), np.int32))
    expected, _ = jax.jit(on_one)(params, control, jax.tree.map(lambda x: x[None], batch))
    gradient = jax.jit(functools.partial(jax.grad(example.loss_of), model=model, instance=INSTANCE))
    found = gradient(params, preprocess(batch["images"]), batch["labels"])
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_picks_as_the_package_does():
    table = [
        ("full", 100, 0.9),
        ("p01_r0.50", 40, 0.7),
        ("p01_r0.75", 60, 0.8),
        ("p02_r0.50", 60, 0.7),
        ("p02_r0.75", 70, 0.8),
    ]
    rows = [tiny.row(*row) for row in table]
    for max_macs in (40, 60, 75, 100):
        assert example.pick(table, max_macs)[0] == select(rows, Budget(max_macs=max_macs)).instance.name
    assert example.pick(table, 39) is None


def test_it_trains_and_prints_a_table_and_a_pick(capsys):
    sizes = ((4, 1),)
    table = example.main(steps=6, batch_size=8, reestimate_batches=2, budget=0.7, sizes=sizes)
    instances = example.Net(num_classes=10, sizes=sizes).instances()
    assert [name for name, _, _ in table] == [instance.name for instance in instances]
    assert table[0][0] == FULL_RESOLUTION.name and all(0 <= accuracy <= 1 for _, _, accuracy in table)
    *lines, chosen = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [name for name, _, _ in table]
    assert chosen == f"within 70% of the MACs: {example.pick(table, 0.7 * table[0][1])}"
