import functools
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
import tiny
from jax import lax

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.programs import devices
from sdpoint_jax.training import step as steps
from sdpoint_jax.training.optimizer import SGD

RATE = 0.1


def make_programs(model, state, batch, preprocess=tiny.preprocess, weight_decay=1e-3, **kwargs):
    return steps.TrainPrograms(
        state,
        batch,
        model=model,
        optimizer=SGD(0.9, False, weight_decay),
        schedule=lambda step: RATE,
        preprocess=preprocess,
        **kwargs,
    )


def make_state(model, weight_decay=1e-3):
    return steps.create_state(model, SGD(0.9, False, weight_decay), 0, tiny.IMAGE_SHAPE)


def control(step, **asked):
    return steps.Control(step, **asked).shard()


def control_of_one():
    """The control of step 0 on one device."""
    return steps.Control(*np.zeros((3, 1), np.int32))


def test_each_instance_is_traced_and_compiled_once():
    model = tiny.net()
    traced = []

    def preprocess(images):
        traced.append(None)
        return tiny.preprocess(images)

    state, batch = make_state(model), devices.shard(tiny.batch(16))
    programs = make_programs(model, state, batch, preprocess)
    instances = model.instances()[:3]
    assert len(list(programs.compile(instances, workers=2))) == 4  # And the update that they share.
    restored = jax.tree.map(np.array, state)
    for start in (state, restored):
        current = devices.replicate(start)
        for step in range(6):
            current, _ = programs[instances[step % 3]](current, control(step), batch)
    assert len(traced) == 3 and len(programs) == 4


def test_a_step_holds_no_branch():
    model = tiny.net()
    for instance in model.instances():
        step = functools.partial(steps.gradient_step, model=model, instances=(instance,), preprocess=tiny.preprocess)
        args = make_state(model).params, control_of_one(), tiny.batch(4)
        primitives = _primitives(jax.make_jaxpr(step, axis_env=[(devices.AXIS, 1)])(*args).jaxpr)
        assert "conv_general_dilated" in primitives
        assert not {"cond", "switch", "while", "platform_index"} & primitives


def _primitives(jaxpr):
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _primitives(inner)
    return found


def plain_forward(params, images):
    """The same pre-activation net written without any of the project's code."""

    def norm_relu(x, norm):
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        return jax.nn.relu(
            (x - mean) / jnp.sqrt(var + 1e-5) * norm["scale"][None, None, None] + norm["bias"][None, None, None]
        )

    def conv(x, kernel, stride=1):
        pad = kernel.shape[0] // 2
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = conv(images, params["stem"]["conv"]["kernel"])
    for name, stride in (("block_01", 1), ("block_02", 2), ("block_03", 2)):
        block = params[name]
        y = norm_relu(x, block["norm1"])
        if "shortcut_conv" in block:
            x = conv(y, block["shortcut_conv"]["kernel"], stride)
        y = norm_relu(conv(y, block["conv1"]["kernel"], stride), block["norm2"])
        x = x + conv(y, block["conv2"]["kernel"])
    x = norm_relu(x, params["head"]["norm"]).mean((1, 2))
    return x @ params["head"]["dense"]["kernel"] + params["head"]["dense"]["bias"][None]


def test_full_resolution_trains_as_the_plain_net_does():
    model = tiny.net(axis_name=devices.AXIS)
    state = make_state(model)

    def plain_loss(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(
            plain_forward(params, tiny.preprocess(images)), labels
        ).mean()

    value_and_grad = jax.jit(jax.value_and_grad(plain_loss))
    params, velocity = state.params, jax.tree.map(jnp.zeros_like, state.params)
    ours = devices.replicate(state)
    programs = make_programs(model, state, devices.shard(tiny.batch(16)))
    for step in range(5):
        batch = tiny.batch(16, seed=step)
        expected, grads = value_and_grad(params, **batch)
        velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-3 * p, velocity, grads, params)
        params = jax.tree.map(lambda p, v: p - RATE * v, params, velocity)
        ours, metrics = programs[FULL_RESOLUTION](ours, control(step), devices.shard(batch))
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    chex.assert_trees_all_close(jax.device_get(ours.params), jax.device_get(params), rtol=1e-2, atol=1e-3)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    labels = jnp.array([0, 2])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = [-(0.7 * row[label] + 0.3 * row.mean()) for row, label in zip(log_probs, labels)]
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.3), expected, rtol=1e-6)


def test_microbatches_average_the_gradients_of_their_parts():
    model, batch = tiny.net(), tiny.batch(32)
    state = make_state(model)
    # A device's share of 4 images as two parts of 2 equals 16 shares of 2.
    programs = make_programs(model, state, devices.shard(batch), microbatches=2)
    halved, metrics = programs[FULL_RESOLUTION](devices.replicate(state), control(0), devices.shard(batch))

    step = functools.partial(steps.gradient_step, model=model, instances=(FULL_RESOLUTION,), preprocess=tiny.preprocess)
    parts = [{name: value[i : i + 2] for name, value in batch.items()} for i in range(0, 32, 2)]
    vmapped = jax.vmap(step, in_axes=(None, None, 0), out_axes=(None, None), axis_name=devices.AXIS)
    stacked = jax.tree.map(lambda *x: np.stack(x), *parts)
    grads, expected = jax.jit(vmapped)(state.params, control_of_one(), stacked)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    moved = jax.tree.map(lambda p, g: p - RATE * (g + 1e-3 * p), state.params, jax.device_get(grads))
    chex.assert_trees_all_close(jax.device_get(halved.params), moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [1, 4])
def test_parts_are_averaged_alike_in_a_loop_and_without(monkeypatch, backend, count):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    values = np.arange(12.0, dtype=np.float32).reshape(count, -1)

    def mean(values):
        return steps._mean_over(lambda values: {"mean": values.mean(), "values": values}, {"values": values}, count)

    loops = [equation for equation in jax.make_jaxpr(mean)(values).eqns if equation.primitive.name == "scan"]
    assert len(loops) == (backend == "gpu" and count > 1)
    found = jax.jit(mean)(values)
    assert found["mean"] == values.mean()
    np.testing.assert_allclose(found["values"], values.mean(0), rtol=1e-6)


@pytest.mark.parametrize("skips", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(skips):
    model = tiny.net()
    state, batch = make_state(model), devices.shard(tiny.batch(16))
    fault_at = 2

    def preprocess(images):  # A first pixel of 255 stands for a fault.
        return jnp.where(images[:1, :1, :1, :1] == 255, jnp.nan, tiny.preprocess(images))

    programs = make_programs(model, state, batch, preprocess, skip_nonfinite=skips)
    current, history = devices.replicate(state), []
    for step in range(5):
        batch = tiny.batch(16, seed=step)
        batch["images"][:, 0, 0, 0] = 255 if step == fault_at else 0
        current, metrics = programs[FULL_RESOLUTION](current, control(step), devices.shard(batch))
        assert bool(metrics["finite"]) == (step != fault_at)
        history.append(jax.device_get(current))
    chex.assert_trees_all_equal(history[1].params, history[fault_at].params)
    chex.assert_trees_all_equal(history[1].opt_state, history[fault_at].opt_state)
    if skips:
        assert [int(state.step) for state in history] == [1, 2, 3, 4, 5]
        assert any(np.any(a != b) for a, b in zip(*(jax.tree.leaves(history[i].params) for i in (1, 3))))
    else:
        assert [int(state.step) for state in history] == [1, 2, 2, 2, 2]
        chex.assert_trees_all_equal(history[1].params, history[4].params)


def test_the_average_of_the_parameters_follows_them_at_its_rate():
    model = tiny.net()
    optimizer = SGD(0.9, False, 1e-3)
    state = steps.create_state(model, optimizer, 0, tiny.IMAGE_SHAPE, ema=True)
    batch = devices.shard(tiny.batch(16))
    programs, plain = (make_programs(model, start, batch, ema_decay=0.75) for start in (state, make_state(model)))
    current, without = devices.replicate(state), devices.replicate(make_state(model))
    average = state.params
    for step in range(3):
        current, _ = programs[FULL_RESOLUTION](current, control(step), batch)
        without, _ = plain[FULL_RESOLUTION](without, control(step), batch)
        params = jax.device_get(current.params)
        average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, params)
    chex.assert_trees_all_close(jax.device_get(current.ema), average, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_equal(params, jax.device_get(without.params))
    assert without.ema is None


def test_a_flag_of_any_device_reaches_all():
    model = tiny.net()
    state, batch = make_state(model), devices.shard(tiny.batch(16))
    one_stops = steps.Control(*np.zeros((3, 8, 1), np.int32))
    one_stops.stop[3] = 1
    _, metrics = make_programs(model, state, batch)[FULL_RESOLUTION](devices.replicate(state), one_stops, batch)
    assert metrics["agreed"] == steps.Control(0, 1, 0)


def test_the_state_is_donated():
    model = tiny.net()
    state, batch = make_state(model), devices.shard(tiny.batch(16))
    before = devices.replicate(state)
    after, _ = make_programs(model, state, batch)[FULL_RESOLUTION](before, control(0), batch)
    jax.block_until_ready(after)
    assert before.params["stem"]["conv"]["kernel"].is_deleted()


LOSSES = """
import json, sys
sys.path[:0] = {paths}
import jax, numpy as np, tiny, test_step
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.programs import devices
from sdpoint_jax.instance import sample_instance
test_step.RATE = 0.03  # At larger steps, rounding can push a ReLU over its kink, and the losses apart by 1e-3.
model = tiny.net(axis_name=devices.AXIS)
state = test_step.make_state(model)
programs = test_step.make_programs(model, state, devices.shard(tiny.batch(16)))
current, losses = devices.replicate(state), []
for step in range(20):
    instance = sample_instance(0, step, model.instances()[:3])
    batch = devices.shard(tiny.batch(16, seed=step % 4))
    current, metrics = programs[instance](current, test_step.control(step), batch)
    losses.append(float(metrics["loss"]))
print(json.dumps(losses))
"""


def test_eight_devices_train_as_one_with_cross_device_norm():
    here = pathlib.Path(__file__).parent
    script = LOSSES.format(paths=[str(here), str(here.parent)])
    runs = []
    for count in (1, 8):
        environment = os.environ | {"XLA_FLAGS": processes.xla_flags(count)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    assert runs[0][0] != runs[0][-1]
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_devices_is_named():
    with pytest.raises(
        ValueError, match="config.batch_size 12: does not divide over 8 devices; the nearest is 8 or 16"
    ):
        devices.check_batch_size(12, "config.batch_size")


def test_programs_know_instances_by_value():
    model = tiny.net()
    state, batch = make_state(model), devices.shard(tiny.batch(16))
    programs = make_programs(model, state, batch)
    for _ in range(2):
        programs[SDPointInstance(1, 0.5)](devices.replicate(state), control(0), batch)
    assert len(programs) == 2
