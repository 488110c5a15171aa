"""The same logits and gradients as PyTorch, for the same weights: the authors' numbers, and a plain formulation.

Numbers of the authors' release for every instance are read from `shared/reference` beside the checkout, where it is.
Those in `golden`, fewer, are checked everywhere.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_formulation as formulation
from flax.traverse_util import flatten_dict

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.interop.torch_import import import_torch_state_dict
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import ResNet

HERE = pathlib.Path(__file__).parent
REFERENCE = HERE.parents[2] / "shared" / "reference"
REFERENCES = ("resnet18", "resnet50", "preresnet34", "preresnet50", "resnext50")
GOLDEN = json.loads((HERE / "golden" / "logits.json").read_text())
TOLERANCE = 2e-5  # Of the largest logit, in float32.
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
GRADIENT_TOLERANCE = 1e-5  # Of a tensor's largest gradient, in float64: in float32 a ReLU at 0 may flip.


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_logits_of_all_instances_are_those_of_the_authors_release(name):
    images = formulation.named_images(2, 3, 224, 224)[:1]  # The second one would take as long again.
    _check_named_net(name, images, {instance: logits[:1] for instance, logits in _authors_logits(name).items()})


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_logits_are_those_of_the_golden_file(name):
    rows = GOLDEN[name]["rows"]
    expected = {SDPointInstance(point, ratio): np.array([logits], np.float32) for point, ratio, logits in rows}
    _check_named_net(name, formulation.named_images(1, 3, *GOLDEN[name]["image_size"]), expected)


@pytest.mark.parametrize("name", ["resnet34", "resnet152", "preresnet18", "preresnet200", "resnext152"])
def test_other_nets_of_the_release_to_the_deepest_of_each_family_compute_what_pytorch_does(name):
    torch = pytest.importorskip("torch")
    model = create_model(name, 10)
    state_dict = _random_state_dict(formulation.net_shapes(name, 10))
    images = formulation.named_images(1, 3, 224, 224)
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    instance = SDPointInstance(model.num_blocks // 2, 0.5)
    with torch.no_grad():
        expected = formulation.torch_logits(tensors, torch.from_numpy(images), instance.point, instance.ratio)
    variables = import_torch_state_dict(state_dict, model)
    _check_logits(_logits(model, variables, images, [instance]), {instance: expected.numpy()})


def _block_nets():
    """A net for every kind of block, with an ImageNet stem: [model, names and shapes of its tensors]."""
    kinds = [
        (bottleneck, preactivation, "projection_norm")
        for bottleneck in (False, True)
        for preactivation in (False, True)
    ]
    kinds += [(False, False, "padded_identity"), (True, True, "projection")]
    for bottleneck, preactivation, shortcut in kinds:
        groups = 4 if bottleneck and not preactivation else 1
        features = 256 if bottleneck else 16
        net = Architecture((2, 1), 16, features, bottleneck, preactivation, 16, groups=groups, shortcut=shortcut)
        settings = dict(bottleneck=bottleneck, preactivation=preactivation, groups=groups, shortcut=shortcut)
        shapes = formulation.tensor_shapes((2, 1), 5, inner=16, stem=16, out=16, **settings)
        kind = f"{'pre' if preactivation else 'post'}-activation, {'bottleneck' if bottleneck else 'basic'}, {shortcut}"
        yield pytest.param(ResNet(architecture=net, num_classes=5), shapes, id=kind)


@pytest.mark.parametrize("instance", ["stem_r0.75", "p02_r0.50"])
@pytest.mark.parametrize("model, shapes", list(_block_nets()))
def test_training_forward_and_gradients_are_pytorchs(model, shapes, instance):
    pytest.importorskip("torch")
    instance = SDPointInstance.from_name(instance)
    state_dict = formulation.named_state_dict(shapes)
    images, labels = formulation.named_images(4, 3, 60, 44), np.array([0, 3, 1, 4])
    theirs, gradients = _torch_gradients(state_dict, images, labels, instance)
    expected = flatten_dict(import_torch_state_dict(gradients, model)["params"], sep="/")
    variables = import_torch_state_dict(state_dict, model)

    double = model.clone(dtype=jnp.float64)

    def loss(params, images):
        given = variables | {"params": params}
        logits, _ = double.apply(given, images, instance=instance, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), logits

    with jax.enable_x64(True):
        program = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_TO_COMPILE)
        actual, ours = program(variables["params"], _ours(images.astype(np.float64)))
    actual = flatten_dict(actual, sep="/")
    assert _deviation(ours, theirs) <= TOLERANCE
    # What a BatchNorm cancels has a gradient of 0 but for rounding.
    rounding = 1e-6 * max(np.abs(gradient).max() for gradient in expected.values())
    errors = {name: np.abs(actual[name] - expected[name]).max() - rounding for name in expected}
    relative = {name: error / np.abs(expected[name]).max() for name, error in errors.items()}
    assert {name: error for name, error in relative.items() if not error <= GRADIENT_TOLERANCE} == {}


def _torch_gradients(state_dict, images, labels, instance):
    """Training-mode logits and a state dict with gradients of the cross-entropy in place of weights."""
    import torch

    tensors = {name: torch.from_numpy(array.astype(np.float64)) for name, array in state_dict.items()}
    trained = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name.endswith(("weight", "bias"))}
    images = torch.from_numpy(images.astype(np.float64))
    logits = formulation.torch_logits(tensors, images, instance.point, instance.ratio, train=True)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    return logits.detach().numpy(), state_dict | {name: tensor.grad.numpy() for name, tensor in trained.items()}


def _authors_instance(block_id, ratio, num_blocks):
    if block_id == -1:
        return FULL_RESOLUTION
    return SDPointInstance(STEM if block_id == num_blocks else int(block_id) + 1, float(ratio))


def _authors_logits(name):
    """Logits [2, 10] by instance."""
    if not REFERENCE.is_dir():
        pytest.skip("no shared/reference beside the checkout")
    shapes = json.loads((REFERENCE / f"{name}.shapes.json").read_text())
    assert {tensor: tuple(shape) for tensor, shape in shapes.items()} == formulation.net_shapes(name, 10)
    file, model = np.load(REFERENCE / f"{name}.npz"), create_model(name, 10)
    ids = zip(file["block_id"], file["ratio"])
    expected = {_authors_instance(*pair, model.num_blocks): logits for pair, logits in zip(ids, file["logits"])}
    assert set(expected) == set(model.instances())
    return expected


def _check_named_net(name, images, expected):
    model = create_model(name, 10)
    variables = import_torch_state_dict(formulation.named_state_dict(formulation.net_shapes(name, 10)), model)
    _check_logits(_logits(model, variables, images, expected), expected)


def _random_state_dict(shapes):
    """Weights drawn in one go, faster than by name: such that activations neither vanish nor explode."""
    rng = np.random.default_rng(0)
    state_dict = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
        state_dict[name] = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
        if len(shape) == 1 and name.endswith(("weight", "running_var")):
            state_dict[name] += np.float32(0.5)
    return state_dict


def _logits(model, variables, images, instances):
    """Logits by instance, of images [B, C, H, W]; what comes before a point is computed once.

    Layer by layer: the layers of all nets have few shapes, which is quicker to compile than a program per instance.
    """
    net, logits = model.bind(variables), {}
    x, start = net.prefix(_ours(images), STEM, train=False), STEM
    for point in (STEM, *range(1, model.num_blocks + 1)):
        x, start = net.between(x, start, point, train=False), point
        for instance in instances:
            if model.last_shared_point(instance) == point:
                logits[instance] = net.suffix(x, point, instance=instance, train=False)
    return logits


def _ours(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def _check_logits(actual, expected):
    assert set(actual) == set(expected)
    deviations = {instance.name: _deviation(actual[instance], expected[instance]) for instance in expected}
    assert {name: deviation for name, deviation in deviations.items() if not deviation <= TOLERANCE} == {}


def _deviation(actual, expected):
    """The largest difference, relative to the largest number expected."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())
