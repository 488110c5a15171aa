"""The families beside the residual nets: published sizes, the contract, independent formulations, PyTorch's logits."""

import functools
import warnings
import zlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.interop.torch_import import DIALECTS, import_torch_state_dict, torch_tensors
from sdpoint_jax.models import convnext, densenet, efficientnet, mobilenet, regnet, vgg, vit
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.registry import FAMILIES, create_model, model_names

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
K = 5
# A small net of each family, and the side of images for it.
SMALL = {
    "densenet": (densenet.DenseNet(num_classes=K, depths=(2, 2), growth=4, stem_features=8, imagenet=True), 24),
    "vgg": (vgg.VGG(num_classes=K, depths=(1, 2), widths=(4, 8), hidden=8), 16),
    "mobilenet_v2": (
        mobilenet.MobileNet(
            num_classes=K, row=mobilenet.Row(2, 0.25, ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2)), 16, 0)
        ),
        24,
    ),
    "mobilenet_v3": (
        mobilenet.MobileNet(
            num_classes=K,
            row=mobilenet.Row(3, 1.0, ((3, 16, 16, 1, 0, 1), (5, 24, 16, 1, 1, 2), (3, 24, 24, 0, 1, 1)), 16, 8, 1e-3),
        ),
        24,
    ),
    "efficientnet": (
        efficientnet.EfficientNet(
            num_classes=K,
            row=efficientnet.Row(((1, 1, 3, 1, 8, 1), (1, 4, 3, 2, 8, 2), (0, 4, 5, 2, 16, 2)), 8, 16, 0.2, 1e-3),
        ),
        24,
    ),
    "regnet": (regnet.RegNet(num_classes=K, row=regnet.Row((1, 2), (8, 16), (4, 8), True)), 24),
    "convnext": (convnext.ConvNeXt(num_classes=K, row=convnext.Row((1, 2), (8, 16), 0.1), patch=2), 24),
    "vit": (vit.ViT(num_classes=K, row=vit.Row(4, 16, 2, 2), image_size=24), 24),
}
# Parameters at 1,000 classes, of torchvision's table of weights; the small DenseNets at 10, of the paper's table 2.
PUBLISHED = {
    "densenet121": 7_978_856,
    "vgg11_bn": 132_868_840,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "efficientnet_b0": 5_288_548,
    "efficientnet_v2_s": 21_458_488,
    "regnet_x_400mf": 5_495_976,
    "regnet_y_400mf": 4_344_144,
    "convnext_tiny": 28_589_128,
    "vit_b_16": 86_567_656,
}


@functools.cache
def _variables(name):
    model, side = SMALL[name]
    return _draw(model, (2, side, side, 3))


def _draw(model: SDPointNet, shape):
    """Random variables of a size that keeps activations."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)

    def draw(path, leaf):
        rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
        normal = rng.standard_normal(leaf.shape, np.float32)
        if path[-1] == "kernel":
            return normal * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return 0.5 + np.abs(normal) / 2 if path[-1] in ("scale", "var", "layer_scale") else normal / 4

    return unflatten_dict({path: draw(path, leaf) for path, leaf in flatten_dict(shapes).items()})


def _images(name):
    side = SMALL[name][1]
    return np.random.default_rng(1).standard_normal((2, side, side, 3), np.float32)


def _apply(name, instance):
    model = SMALL[name][0]
    run = functools.partial(model.apply, instance=instance, train=False)
    return jax.jit(run, compiler_options=QUICK_TO_COMPILE)(_variables(name), _images(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_nets_have_the_published_number_of_parameters(name):
    model = create_model(name, 1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PUBLISHED[name]


def test_a_small_densenet_has_the_published_number_of_parameters():
    model = create_model("densenet_bc_100_12", 10)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) / 1e6, 1) == 0.8


def test_every_name_of_every_family_makes_a_net_and_is_there_once():
    names = model_names()
    assert len(set(names)) == len(names) == sum(len(family.NAMES) for family in FAMILIES)
    for name in names:
        assert create_model(name, 10, dtype="bfloat16").num_blocks >= 3


@pytest.mark.parametrize("name", SMALL)
def test_an_instance_is_a_prefix_and_a_suffix_and_differs_from_full_resolution(name):
    model, variables, instance = SMALL[name][0], _variables(name), SDPointInstance(1, 0.5)
    run = functools.partial(model.apply, variables, train=False)

    def all_of(images):
        x = run(run(images, STEM, method="prefix"), STEM, 1, method="between")
        parts = [run(x, 1, instance=i, method="suffix") for i in (FULL_RESOLUTION, instance)]
        return parts, [run(images, instance=i) for i in (FULL_RESOLUTION, instance)]

    (full, downsampled), wholes = jax.jit(all_of, compiler_options=QUICK_TO_COMPILE)(_images(name))
    np.testing.assert_allclose(full, wholes[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(downsampled, wholes[1], rtol=1e-4, atol=1e-5)
    assert full.shape == (2, K) and full.dtype == jnp.float32 and np.isfinite(full).all()
    assert np.abs(downsampled - full).max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_variable_has_a_tensor_of_its_own_and_comes_back_from_it(name, dialect):
    model, variables = SMALL[name][0], _variables(name)
    tensors = torch_tensors(model, 3, dialect)
    arrays = flatten_dict(variables)
    assert {tensor.path for tensor in tensors.values()} == set(arrays)
    theirs = {}
    for tensor_name, tensor in tensors.items():
        array = arrays[tensor.path]
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
        if tensor.ours is None or array.ndim == 2:
            array = array.transpose(axes[array.ndim])
        theirs[tensor_name] = array.reshape(tensor.shape)
    back = flatten_dict(import_torch_state_dict(theirs, model))
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array)


# Independent formulations: lax calls on the variables, with the pool of the point written out.


def _conv(x, params, stride=1, groups=1, padding=None):
    kernel = params["kernel"]
    pad = kernel.shape[0] // 2 if padding is None else padding
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + params.get("bias", 0.0)


def _norm(x, variables, *path, epsilon=1e-5):
    params, stats = (
        functools.reduce(lambda tree, key: tree[key], path, variables[k]) for k in ("params", "batch_stats")
    )
    return (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * params["scale"] + params["bias"]


def _halve(x):
    """Average of 2x2 cells: the pool at ratio 1/2 of even sides."""
    return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))


@jax.numpy_rank_promotion("allow")
def test_an_instance_of_densenet_is_the_concatenated_map_pooled_after_a_layer():
    v, x = _variables("densenet"), _images("densenet")
    p = v["params"]
    x = jax.nn.relu(_norm(_conv(x, p["stem"]["conv"], 2), v, "stem", "norm"))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    for k in range(1, 5):
        block = f"block_{k:02d}"
        if k == 3:
            x = _halve(_conv(jax.nn.relu(_norm(x, v, block, "transition_norm")), p[block]["transition_conv"]))
        y = _conv(jax.nn.relu(_norm(x, v, block, "norm1")), p[block]["conv1"])
        y = _conv(jax.nn.relu(_norm(y, v, block, "norm2")), p[block]["conv2"])
        x = jnp.concatenate([x, y], -1)
        if k == 1:
            assert x.shape == (2, 6, 6, 12)
            x = x.reshape(2, 3, 2, 3, 2, 12).mean((2, 4))  # 6 -> 3
            x = jnp.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])[:, :3, :3]
        if k == 2:
            x = x[:, :2, :2]  # What a 2x2/2 pool of a 3x3 map reads.
    x = jax.nn.relu(_norm(x, v, "head", "norm")).mean((1, 2))
    expected = x @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"]
    np.testing.assert_allclose(_apply("densenet", SDPointInstance(1, 0.5)), expected, rtol=1e-4, atol=1e-5)


@jax.numpy_rank_promotion("allow")
def test_an_instance_of_mobilenet_is_pooled_after_the_addition():
    model, v, x = SMALL["mobilenet_v2"][0], _variables("mobilenet_v2"), _images("mobilenet_v2")
    p, relu6 = v["params"], lambda x: jnp.clip(x, 0, 6)
    x = relu6(_norm(_conv(x, p["stem"]["conv"], 2), v, "stem", "norm"))
    for k, stride in ((1, 1), (2, 2), (3, 1), (4, 2)):
        block, y = f"block_{k:02d}", x
        if "expand" in p[block]:
            y = relu6(_norm(_conv(y, p[block]["expand"]["conv"]), v, block, "expand", "norm"))
        y = _conv(y, p[block]["depthwise"]["conv"], stride, y.shape[-1])
        y = relu6(_norm(y, v, block, "depthwise", "norm"))
        y = _norm(_conv(y, p[block]["project"]["conv"]), v, block, "project", "norm")
        x = x + y if k in (1, 3) else y
        x = _halve(x) if k == 3 else x  # 6 -> 3
    assert model.num_blocks == 4
    x = relu6(_norm(_conv(x, p["head"]["last"]["conv"]), v, "head", "last", "norm")).mean((1, 2))
    expected = x @ p["head"]["dense"]["kernel"] + p["head"]["dense"]["bias"]
    np.testing.assert_allclose(_apply("mobilenet_v2", SDPointInstance(3, 0.5)), expected, rtol=1e-4, atol=1e-5)


@jax.numpy_rank_promotion("allow")
def test_an_instance_of_a_vit_has_fewer_tokens_and_the_same_class_token():
    v, x = _variables("vit"), _images("vit")
    p, row = v["params"], SMALL["vit"][0].row
    side = 24 // row.patch
    patches = x.reshape(2, side, row.patch, side, row.patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, side**2, -1)
    kernel = p["stem"]["patches"]["kernel"].reshape(-1, row.width)
    tokens = jnp.concatenate(
        [jnp.tile(p["stem"]["class_token"], (2, 1, 1)), patches @ kernel + p["stem"]["patches"]["bias"]], 1
    )
    tokens = tokens + p["stem"]["positions"]

    def norm(x, params):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * params["scale"] + params["bias"]

    def dense(x, params):
        return x @ params["kernel"] + params["bias"]

    for k in (1, 2):
        block = p[f"block_{k:02d}"]
        q, keys, values = np.split(dense(norm(tokens, block["norm1"]), block["qkv"]), 3, axis=-1)
        heads = []
        for part in (slice(0, 8), slice(8, 16)):
            scores = jnp.einsum("bqd,bkd->bqk", q[..., part], keys[..., part]) / np.sqrt(8)
            heads.append(jax.nn.softmax(scores) @ values[..., part])
        tokens = tokens + dense(jnp.concatenate(heads, -1), block["projection"])
        inner = dense(norm(tokens, block["norm2"]), block["dense1"])
        inner = inner * (1 + lax.erf(inner / np.sqrt(2))) / 2
        tokens = tokens + dense(inner, block["dense2"])
        if k == 1:
            of_map = _halve(tokens[:, 1:].reshape(2, side, side, -1))
            tokens = jnp.concatenate([tokens[:, :1], of_map.reshape(2, (side // 2) ** 2, -1)], 1)
    expected = dense(norm(tokens[:, 0], p["head"]["norm"]), p["head"]["dense"])
    np.testing.assert_allclose(_apply("vit", SDPointInstance(1, 0.5)), expected, rtol=1e-4, atol=1e-5)


def test_stochastic_depth_is_off_in_evaluation_and_drops_whole_images_in_training():
    model, variables = SMALL["convnext"][0], _variables("convnext")
    apply = functools.partial(model.apply, {"params": variables["params"]}, _images("convnext"))
    outputs = {float(apply(train=True, rngs={"params": jax.random.key(seed)}).sum()) for seed in range(40)}
    assert 1 < len(outputs) <= 16  # Two images, each with or without the residual of two blocks.
    assert isinstance(model.bind({}).blocks[0], nn.Module)


# Names here and in the library, and the side of images.
PARITY = [
    ("densenet121", "torchvision", 64),
    ("vgg11_bn", "torchvision", 32),
    ("mobilenet_v2", "torchvision", 64),
    ("mobilenet_v3_small", "torchvision", 64),
    ("efficientnet_b0", "torchvision", 64),
    ("efficientnet_v2_s", "torchvision", 64),
    ("regnet_y_400mf", "torchvision", 64),
    ("convnext_tiny", "torchvision", 64),
    ("vit_b_32", "torchvision", 224),
    ("mobilenetv3_small_100", "timm", 64),
    ("regnety_004", "timm", 64),
    ("convnext_tiny", "timm", 64),
    ("vit_tiny_patch16_224", "timm", 224),
]


def _import(torch, library):
    """Import torchvision or timm, whose own operators no classifier needs: a CPU build of PyTorch may lack them."""
    register = torch.library.register_fake

    def register_known(name, *args, **kwargs):
        ours = isinstance(name, str) and name.startswith("torchvision::")
        return (lambda function: function) if ours else register(name, *args, **kwargs)

    with mock.patch.object(torch.library, "register_fake", register_known), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(library, exc_type=ImportError)


@pytest.mark.parametrize("name, library, side", PARITY)
def test_logits_are_those_of_pytorch(name, library, side):
    torch = pytest.importorskip("torch")
    models = _import(torch, library)
    theirs = (
        getattr(models.models, name)(num_classes=K)
        if library == "torchvision"
        else models.create_model(name, num_classes=K)
    )
    state = {}
    for key, tensor in theirs.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        normal, shape = rng.standard_normal(tuple(tensor.shape), np.float32), tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            state[key] = tensor
            continue
        if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            normal = 0.5 + np.abs(normal) / 2
        elif len(shape) > 1 and key.endswith("weight"):
            normal = normal / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            normal = normal / 4
        state[key] = torch.from_numpy(normal)
    theirs.load_state_dict(state)
    images = np.random.default_rng(1).standard_normal((2, side, side, 3), np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    model = create_model(name, K)
    variables = import_torch_state_dict(state, model)
    run = jax.jit(functools.partial(model.apply, train=False), compiler_options=QUICK_TO_COMPILE)
    found = run(variables, images)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
