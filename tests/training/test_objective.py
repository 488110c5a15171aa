"""Several instances in one step are just what they are one by one, and teachers teach what they should."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
from flax.traverse_util import flatten_dict

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.norm_parameters import params_for, with_own_norms
from sdpoint_jax.models.resnet import ResNet
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.programs import devices
from sdpoint_jax.training import step as steps
from sdpoint_jax.training.objective import Distillation, check_loss, distillation_loss, forward_set, losses_of_set
from sdpoint_jax.training.optimizer import SGD

NETS = {
    "ResNet": Architecture((1, 1, 1), 4, 4, stem=4, imagenet_stem=False, shortcut="padded_identity"),
    "PreResNet": Architecture((1, 1, 1), 4, 4, preactivation=True, stem=4, imagenet_stem=False, shortcut="projection"),
    "ResNeXt": Architecture((1, 1), 8, 8, bottleneck=True, stem=4, groups=4),
}
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
DISTILLATIONS = {"labels": None, "in place": Distillation(0.7, 2.0), "teacher": "teacher"}


def net(kind, **kwargs):
    return ResNet(architecture=NETS[kind], num_classes=10, **kwargs)


def set_of(model):
    """Full resolution, the cheapest instance and two that downsample at one point."""
    first = STEM if model.has_stem_point else 1
    last = model.num_blocks
    return tuple(SDPointInstance(*pair) for pair in ((0, 1.0), (first, 0.5), (last, 0.5), (last, 0.75)))


def losses_one_by_one(model, params, images, labels, instances, distillation, teacher):
    """The same mean loss, written from its definition: each instance whole, by itself."""

    def logits(instance):
        return model.apply(
            {"params": params_for(params, instance)}, images, instance=instance, train=True, mutable=["batch_stats"]
        )[0]

    total = 0.0
    for instance in instances:
        own = logits(instance)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(own), labels[:, None], 1).mean()
        if distillation and (distillation.teacher or instance != FULL_RESOLUTION):
            if distillation.teacher:
                targets = distillation.teacher.apply(teacher, images, train=False)
            else:
                targets = jax.lax.stop_gradient(logits(FULL_RESOLUTION))
            soft = jax.nn.softmax(targets / distillation.temperature)
            entropy = -(soft * jnp.log(soft)).sum(-1)
            crossed = -(soft * jax.nn.log_softmax(own / distillation.temperature)).sum(-1)
            divergence = distillation.temperature**2 * (crossed - entropy).mean()
            loss = (1 - distillation.weight) * loss + distillation.weight * divergence
        total += loss / len(instances)
    return total


@functools.cache
def one_by_one(model, distillation, dtype):
    """The program of the mean loss of a part of the images, and its gradients."""
    del dtype  # Traced for each.
    loss = functools.partial(losses_one_by_one, model, instances=set_of(model), distillation=distillation)
    return jax.jit(
        jax.value_and_grad(lambda params, teacher, images, labels: loss(params, images, labels, teacher=teacher)),
        compiler_options=QUICK_TO_COMPILE,
    )


def errors(kind, taught, count, dtype, microbatches=1, part=4, own_norms=False, **settings):
    """The largest differences of loss and gradients to those one by one, each relative to the largest value.

    On `count` devices, each with so many parts of `part` images. With `own_norms`, instances have scales and shifts of
    their own, which differ.
    """
    model = net(kind, dtype=dtype)
    size, rng = 32 if model.has_stem_point else 8, np.random.RandomState(0)
    images = rng.standard_normal((count, part * microbatches, size, size, 1)).astype(dtype)
    labels = rng.randint(0, 10, images.shape[:2]).astype(np.int32)
    variables = jax.tree.map(lambda x: np.asarray(x, dtype), tiny_variables(model, size))
    teacher = jax.tree.map(lambda x: x + rng.uniform(0, 0.1, x.shape).astype(dtype), variables)
    params = variables["params"]
    if own_norms:
        params = with_own_norms(model, params, set_of(model))
        params["per_instance"] = jax.tree.map(
            lambda x: x + rng.uniform(0, 0.5, x.shape).astype(dtype), params["per_instance"]
        )
    distillation = Distillation(0.7, 2.0, model) if taught == "teacher" else DISTILLATIONS[taught]
    step = functools.partial(
        steps.gradient_step,
        model=model.clone(**settings),
        instances=set_of(model),
        preprocess=lambda x: x,
        distillation=distillation,
        microbatches=microbatches,
    )
    together = jax.pmap(
        step, devices.AXIS, in_axes=(None, 0, 0, None), out_axes=(None, None), devices=jax.devices()[:count]
    )
    batch, given = {"images": images, "labels": labels}, teacher if taught == "teacher" else None
    grads, metrics = jax.device_get(together(params, steps.Control(*np.zeros((3, count, 1), np.int32)), batch, given))
    apart = one_by_one(model, distillation, dtype)
    batches = zip(images.reshape(-1, part, size, size, 1), labels.reshape(-1, part))
    found = [jax.device_get(apart(params, teacher, *batch)) for batch in batches]
    loss, expected = jax.tree.map(lambda *values: np.mean(values, axis=0), *found)

    each = metrics["instances"]
    assert set(each) == {instance.name for instance in set_of(model)}
    np.testing.assert_allclose(metrics["loss"], np.mean([one["loss"] for one in each.values()]), rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    apart_by = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected))]
    return abs(metrics["loss"] - loss) / abs(loss), max(apart_by) / largest


def tiny_variables(model, size):
    return jax.device_get(jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 1)), train=False))())


@pytest.mark.parametrize(
    "kind, taught, count",
    [(kind, taught, 1) for kind in NETS for taught in DISTILLATIONS] + [(kind, "in place", 8) for kind in NETS],
)
def test_a_step_of_a_set_has_the_losses_and_gradients_of_its_instances_one_by_one(kind, taught, count):
    with jax.enable_x64(True):
        loss, gradient = errors(kind, taught, count, np.float64)
    assert loss <= 1e-10 and gradient <= 1e-10


@pytest.mark.parametrize("kind", NETS)
def test_so_it_has_where_instances_have_scales_and_shifts_of_their_own(kind):
    with jax.enable_x64(True):
        loss, gradient = errors(kind, "in place", 8, np.float64, own_norms=True)
    assert loss <= 1e-10 and gradient <= 1e-10


def test_an_instance_moves_its_own_scales_and_shifts_and_no_others_after_its_point():
    model = net("PreResNet")
    first, second = SDPointInstance(1, 0.5), SDPointInstance(2, 0.5)
    params = with_own_norms(model, tiny_variables(model, 8)["params"], [first, second])
    x = np.random.RandomState(0).standard_normal((4, 8, 8, 1)).astype(np.float32)

    def loss(params):
        return (forward_set(model, params, x, [first])[first] ** 2).sum()

    grads = jax.device_get(jax.jit(jax.grad(loss), compiler_options=QUICK_TO_COMPILE)(params))
    moved = {path: np.abs(grad).max() > 0 for path, grad in flatten_dict(grads, sep="/").items()}
    own = {path for path in moved if path.startswith("per_instance/p01_r0.50/")}
    shared_norms = {path.removeprefix("per_instance/p01_r0.50/") for path in own}
    not_moved = {path for path, has in moved.items() if not has}
    assert not_moved == shared_norms | {path for path in moved if path.startswith("per_instance/p02")} and own


@pytest.mark.parametrize("kind", NETS)
def test_so_it_has_in_float32_in_parts_and_with_recomputed_activations(kind):
    loss, gradient = errors(kind, "in place", 2, np.float32, microbatches=2, part=16, remat=True)
    assert loss <= 1e-5 and gradient <= 1e-5


@pytest.mark.parametrize("kind", NETS)
def test_each_layer_before_a_point_runs_once(kind):
    model = net(kind)
    instances, size = set_of(model), 32 if model.has_stem_point else 8
    x = jnp.zeros((2, size, size, 1))
    params = tiny_variables(model, size)["params"]

    def convolutions(instances):
        with programs_for(Target("gpu")):  # On a CPU, a small convolution is several operations.
            jaxpr = jax.make_jaxpr(lambda params: list(forward_set(model, params, x, instances).values()))(params)
        text = str(jaxpr)
        return text.count("conv_general_dilated[") + text.count("dot_general[")

    blocks = list(model.architecture.blocks())
    of_block = [len(b.convolutions) + (b.shortcut is not None and b.shortcut.kind != "padded_identity") for b in blocks]
    # The cheapest one leaves before the first block, or after it; those at the last point share all but the head.
    after_first = sum(of_block) if model.has_stem_point else sum(of_block[1:])
    assert convolutions((FULL_RESOLUTION,)) == 1 + sum(of_block) + 1
    assert convolutions(instances) == 1 + sum(of_block) + after_first + len(instances)


def test_soft_targets_of_full_resolution_get_no_gradient():
    model, distillation = net("PreResNet"), Distillation(1.0, 3.0)
    params = tiny_variables(model, 8)["params"]
    rng = np.random.RandomState(0)
    batch = {"images": rng.standard_normal((1, 8, 8, 8, 1)), "labels": np.zeros((1, 8), np.int32)}

    def gradients(instances, distillation):
        step = functools.partial(
            steps.gradient_step, model=model, instances=instances, preprocess=jnp.float32, distillation=distillation
        )
        mapped = jax.vmap(step, (None, None, 0), (None, None), axis_name=devices.AXIS, axis_size=1)
        return jax.jit(mapped)(params, steps.Control(*np.zeros((3, 1), np.int32)), batch)[0]

    # At the last point, the suffix is the head alone: the block before it learns from full resolution's labels, and
    # from how far the other instance is from its targets, through that instance's logits only.
    both = gradients((FULL_RESOLUTION, SDPointInstance(3, 0.5)), distillation)
    full = gradients((FULL_RESOLUTION,), None)

    def divergence(params):
        run = functools.partial(model.apply, {"params": params}, jnp.float32(batch["images"][0]), train=True)
        own, _ = run(instance=SDPointInstance(3, 0.5), mutable=["batch_stats"])
        frozen, _ = model.apply(
            {"params": jax.lax.stop_gradient(params)},
            jnp.float32(batch["images"][0]),
            train=True,
            mutable=["batch_stats"],
        )
        return distillation_loss(own, frozen, 3.0).mean()

    soft = jax.jit(jax.grad(divergence))(params)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, full, soft)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), both, expected)


def test_the_mean_of_the_instances_teaches_them_all_from_its_first_step_on():
    rng = np.random.RandomState(0)
    logits = {SDPointInstance(point, 0.5): jnp.float32(rng.standard_normal((4, 3))) for point in (2, 3)}
    labels = jnp.int32([0, 2, 1, 1])
    distillation = Distillation(0.8, 2.0, targets="mean", first_step=5)
    for step, weight in {4: 0.0, 5: 0.8}.items():
        losses = losses_of_set(logits, labels, step=jnp.int32(step), distillation=distillation)
        for instance, own in logits.items():
            hard = -jnp.take_along_axis(jax.nn.log_softmax(own), labels[:, None], 1).mean()
            soft = distillation_loss(own, sum(logits.values()) / 2, 2.0).mean()
            np.testing.assert_allclose(losses[instance], (1 - weight) * hard + weight * soft, rtol=1e-5)


def test_a_gradient_step_counts_the_steps_until_distillation_begins():
    model, instances = net("PreResNet"), (FULL_RESOLUTION, SDPointInstance(3, 0.5))
    params = tiny_variables(model, 8)["params"]
    batch = {"images": np.random.RandomState(0).standard_normal((1, 8, 8, 8, 1)), "labels": np.zeros((1, 8), np.int32)}
    settings = dict(model=model, instances=instances, preprocess=jnp.float32)
    step = functools.partial(steps.gradient_step, distillation=Distillation(1.0, first_step=2), **settings)
    mapped = jax.vmap(step, (None, None, 0), (None, None), axis_name=devices.AXIS, axis_size=1)
    losses = jax.jit(lambda number: mapped(params, steps.Control(*[number[None]] * 3), batch)[1]["instances"])
    before, after = (losses(np.int32(number)) for number in (1, 2))
    assert before["full"]["loss"] == after["full"]["loss"]
    assert before["p03_r0.50"]["loss"] > 1 > after["p03_r0.50"]["loss"]


def test_a_net_that_agrees_with_its_teacher_has_no_loss_from_it():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(distillation_loss(logits, logits + 5, 4.0), 0, atol=1e-5)
    other = jnp.array([[0.0, 1.0, 0.5], [0.1, 0.2, -0.3]])
    soft = jax.nn.softmax(other / 4)
    crossed = -(soft * jax.nn.log_softmax(logits / 4)).sum(-1)
    np.testing.assert_allclose(
        distillation_loss(logits, other, 4.0), 16 * (crossed + (soft * jnp.log(soft)).sum(-1)), rtol=1e-4
    )


SET_LOSSES = """
import json, sys
sys.path[:0] = {paths}
import jax, numpy as np, tiny, test_step
from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.programs import devices
from sdpoint_jax.training.objective import Distillation
model = tiny.net(axis_name=devices.AXIS)
state = test_step.make_state(model)
programs = test_step.make_programs(model, state, devices.shard(tiny.batch(16)), distillation=Distillation(0.5, 2.0))
instances = tuple(SDPointInstance(*pair) for pair in ((0, 1.0), (1, 0.5), (2, 0.75)))
grads, metrics = programs.gradients(instances)(
    devices.replicate(state.params), test_step.control(0), devices.shard(tiny.batch(16)))
norms = [float(np.linalg.norm(leaf)) for leaf in jax.tree.leaves(jax.device_get(grads))]
print(json.dumps([float(metrics["loss"]), *norms]))
"""


def test_eight_devices_have_the_losses_and_gradients_of_one_with_cross_device_norm():
    here = pathlib.Path(__file__).parent
    script = SET_LOSSES.format(paths=[str(here), str(here.parent)])
    runs = []
    for count in (1, 8):
        environment = os.environ | {"XLA_FLAGS": processes.xla_flags(count)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-5)


def test_programs_of_sets_update_as_those_of_instances_do():
    model = tiny.net()
    state, batch = steps.create_state(model, SGD(0.9, False, 0.0), 0, tiny.IMAGE_SHAPE), devices.shard(tiny.batch(16))
    programs = steps.TrainPrograms(
        state,
        batch,
        model=model,
        optimizer=SGD(0.9, False, 0.0),
        schedule=lambda step: 0.1,
        preprocess=tiny.preprocess,
    )
    pair = FULL_RESOLUTION, SDPointInstance(1, 0.5)
    ends = []
    for key in (*pair, pair):
        after, metrics = programs[key](devices.replicate(state), steps.Control(0).shard(), batch)
        ends.append(jax.device_get(after.params))
        assert set(metrics["instances"]) == ({i.name for i in pair} if key == pair else set())
    moved = jax.tree.map(lambda a, b: (a + b) / 2, *ends[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ends[2], moved)


def squared(logits, batch):
    """A loss of a user's own: the mean squared distance of probabilities from the labels."""
    targets = jax.nn.one_hot(batch["labels"], 10)
    each = [jnp.square(jax.nn.softmax(own) - targets).sum(-1).mean() for own in logits.values()]
    return sum(each) / len(each), {"largest": jnp.stack(each).max(), "of_step": batch["step"].astype(jnp.float32)}


def test_a_loss_of_the_users_own_is_what_a_step_minimises():
    model, instances = net("PreResNet"), (FULL_RESOLUTION, SDPointInstance(3, 0.5))
    params = tiny_variables(model, 8)["params"]
    images = np.random.RandomState(0).standard_normal((8, 8, 8, 1))
    batch = {"images": images[None], "labels": np.arange(8, dtype=np.int32)[None]}
    step = functools.partial(
        steps.gradient_step, model=model, instances=instances, preprocess=jnp.float32, loss=squared, microbatches=2
    )
    mapped = jax.vmap(step, (None, None, 0), (None, None), axis_name=devices.AXIS, axis_size=1)
    grads, metrics = jax.jit(mapped)(params, steps.Control(*np.full((3, 1), 4, np.int32)), batch)

    def expected(params):
        parts = []
        for part in (slice(0, 4), slice(4, 8)):
            logits = forward_set(model, params, jnp.float32(images[part]), instances)
            parts.append(squared(logits, {"labels": batch["labels"][0, part], "step": jnp.int32(4)})[0])
        return sum(parts) / 2

    loss, by_hand = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, by_hand)
    assert metrics["largest"] >= metrics["loss"] and metrics["of_step"] == 4
    assert {name: set(found) for name, found in metrics["instances"].items()} == {
        instance.name: {"accuracy"} for instance in instances
    }


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, batch: logits[FULL_RESOLUTION].mean(), r"returns float32\[\]; needs \(loss, metrics\)"),
        (lambda logits, batch: (logits[FULL_RESOLUTION].mean(-1), {}), r"float32\[4\].*a scalar and a dict of scalars"),
        (lambda logits, batch: (logits[FULL_RESOLUTION].mean(), {"accuracy": 1 * batch["step"]}), "metric 'accuracy'"),
    ],
)
def test_a_loss_of_another_form_is_refused_before_the_first_step(loss, message):
    batch = {"labels": jax.ShapeDtypeStruct((4,), np.int32), "step": jax.ShapeDtypeStruct((), np.int32)}
    with pytest.raises(ValueError, match=f"config.loss mine:loss: .*{message}"):
        check_loss(loss, "mine:loss", (FULL_RESOLUTION, SDPointInstance(1, 0.5)), batch, 10)
