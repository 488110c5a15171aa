"""The nets: full resolution is the plain net, an instance changes what comes after its point and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import ARCHITECTURES, PreActivationBlock, ResNet, architecture
from sdpoint_jax.models.shared_trace import reestimating

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
# A block of every kind, with and without projection; small images unless named ImageNet.
NETS = {
    "basic": Architecture((2, 1), 8, 8, stem=8, imagenet_stem=False),
    "basic preactivation": Architecture((2, 1), 8, 8, preactivation=True, stem=8, imagenet_stem=False),
    "bottleneck": Architecture((2, 1), 8, 16, bottleneck=True, stem=8, groups=2),
    "bottleneck preactivation": Architecture((2, 1), 8, 16, bottleneck=True, preactivation=True, stem=8),
}
IMAGES = np.random.default_rng(0).standard_normal((2, 20, 14, 3), np.float32)
LARGER_IMAGES = np.random.default_rng(0).standard_normal((2, 40, 28, 3), np.float32)


def _net(kind, **settings):
    """A net with random variables, and images for it."""
    model = ResNet(architecture=NETS[kind], num_classes=5, **settings)
    images = LARGER_IMAGES if model.has_stem_point else IMAGES
    return model, _random_variables(model, images), images


def _random_variables(model, images):
    """Variables with which activations keep their size and have both signs."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        normal = rng.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            return normal * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        return 0.5 + np.abs(normal) / 2 if path[-1] in ("scale", "var") else normal / 4

    return unflatten_dict({path: draw(path, leaf.shape) for path, leaf in flatten_dict(shapes).items()})


def _shapes(model, images, **settings):
    variables = jax.eval_shape(functools.partial(model.init, train=False, **settings), jax.random.key(0), images)
    return flatten_dict(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables), sep="/")


@pytest.mark.parametrize("kind", NETS)
def test_full_resolution_is_the_plain_net(kind):
    model, variables, images = _net(kind)
    expected = _plain_net(NETS[kind], variables, images)
    np.testing.assert_allclose(model.apply(variables, images, train=False), expected, rtol=2e-5, atol=1e-5)


def _plain_net(net, variables, x):
    """Logits of a residual net, without anything of ours: lax calls on its variables."""

    def conv(x, path, stride=1):
        kernel = functools.reduce(lambda tree, key: tree[key], path.split("/"), variables["params"])["kernel"]
        numbers, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1] // kernel.shape[2]
        padding = [(kernel.shape[0] // 2,) * 2] * 2
        return lax.conv_general_dilated(
            x, kernel, (stride,) * 2, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    def norm(x, path):
        params, stats = (
            functools.reduce(lambda tree, key: tree[key], path.split("/"), variables[kind])
            for kind in ("params", "batch_stats")
        )
        mean, scale = stats["mean"], params["scale"] / np.sqrt(stats["var"] + 1e-5)
        return (x - mean[None, None, None]) * scale[None, None, None] + params["bias"][None, None, None]

    relu = functools.partial(jnp.maximum, 0)
    before, after = (lambda x, path: relu(norm(x, path)), lambda x, path: x)
    x = conv(x, "stem/conv", 2 if net.imagenet_stem else 1)
    if net.imagenet_stem or not net.preactivation:
        x = relu(norm(x, "stem/norm"))
    if net.imagenet_stem:
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    if not net.preactivation:
        before, after = after, norm
    for k in range(1, 4):
        block, stride = f"block_{k:02d}", 2 if k == 3 else 1
        y = shortcut = x
        last = 3 if net.bottleneck else 2
        for i in range(1, last + 1):
            y = before(y, f"{block}/norm{i}")
            if i == 1 and "shortcut_conv" in variables["params"][block]:
                shortcut = norm(conv(y, f"{block}/shortcut_conv", stride), f"{block}/shortcut_norm")
            y = after(conv(y, f"{block}/conv{i}", stride if i == last - 1 else 1), f"{block}/norm{i}")
            y = y if net.preactivation or i == last else relu(y)
        x = shortcut + y if net.preactivation else relu(shortcut + y)
    if net.preactivation:
        x = relu(norm(x, "head/norm"))
    dense = variables["params"]["head"]["dense"]
    return x.mean((1, 2)) @ dense["kernel"] + dense["bias"][None]


@pytest.mark.parametrize("kind", NETS)
def test_all_instances_have_the_same_variables(kind):
    model, variables, images = _net(kind)
    full = _shapes(model, images)
    assert full == flatten_dict(jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables), sep="/")
    for instance in model.instances():
        assert _shapes(model, images, instance=instance) == full, instance.name


@pytest.mark.parametrize("kind", NETS)
def test_downsampling_after_a_block_leaves_the_blocks_up_to_it_bitwise(kind):
    model, variables, images = _net(kind)
    full = _block_outputs(model, variables, images, FULL_RESOLUTION)
    for instance in model.instances()[1:]:
        outputs = _block_outputs(model, variables, images, instance)
        assert len(outputs) == model.num_blocks == 3
        for k in range(1, 4):
            same = outputs[k].shape == full[k].shape and bool((outputs[k] == full[k]).all())
            assert same == (k <= instance.point), (instance.name, k)


def _block_outputs(model, variables, images, instance):
    _, captured = model.apply(variables, images, instance=instance, train=False, capture_intermediates=True)
    blocks = {name: values["__call__"][0] for name, values in captured["intermediates"].items() if "block" in name}
    return {int(name.removeprefix("block_")): output for name, output in blocks.items()}


@pytest.mark.parametrize("kind", NETS)
def test_the_forward_is_prefix_and_suffix_of_any_point_that_is_shared(kind):
    model, variables, images = _net(kind)
    run = functools.partial(model.apply, variables, train=False)
    for instance in (FULL_RESOLUTION, SDPointInstance(2, 0.5)):
        whole, x, start = run(images, instance=instance), run(images, STEM, method="prefix"), STEM
        for point in (STEM, *range(1, model.last_shared_point(instance) + 1)):
            x, start = run(x, start, point, method="between"), point
            np.testing.assert_array_equal(run(x, point, instance=instance, method="suffix"), whole)
            np.testing.assert_array_equal(run(images, point, method="prefix"), x)


def test_a_suffix_does_not_start_after_the_point_of_its_instance():
    model, variables, images = _net("basic")
    x = model.apply(variables, images, 2, train=False, method="prefix")
    with pytest.raises(ValueError, match="instance p01_r0.50 downsamples before point 2"):
        model.apply(variables, x, 2, instance=SDPointInstance(1, 0.5), train=False, method="suffix")


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_post_activation_pool_comes_before_the_last_relu(kind):
    model, variables, images = _net(kind)
    instance = SDPointInstance(model.num_blocks, 1e-9)  # To a single cell: pool, ReLU, mean, not ReLU, pool, mean.
    x = _block_outputs(model, variables, images, FULL_RESOLUTION)[3]
    assert x.min() < 0 < x.max()
    dense = variables["params"]["head"]["dense"]
    expected = nn.relu(x.mean((1, 2))) @ dense["kernel"] + dense["bias"][None]
    np.testing.assert_allclose(model.apply(variables, images, instance=instance, train=False), expected, atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_variables_and_logits(kind):
    model, variables, images = _net(kind, dtype=jnp.bfloat16)
    assert {dtype for _, dtype in _shapes(model, images).values()} == {jnp.dtype("float32")}
    outputs = _block_outputs(model, variables, images, SDPointInstance(2, 0.75))
    assert {output.dtype for output in outputs.values()} == {jnp.dtype("bfloat16")}
    logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    exact = _net(kind)[0].apply(variables, images, train=False)
    # About 10 layers that round to 8 bits each.
    error = np.abs(model.apply(variables, images, train=False) - exact).max()
    assert 0 < error < 10 * 2**-8 * np.abs(exact).max()


def test_reestimation_leaves_the_statistics_of_the_batch():
    model, variables, images = _net("basic")
    with reestimating():
        _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    stem = nn.Conv(8, (3, 3), use_bias=False).apply({"params": variables["params"]["stem"]["conv"]}, images)
    after = updated["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(after["mean"], stem.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["var"], stem.var((0, 1, 2)), rtol=1e-4)


def test_recomputing_activations_changes_no_gradient():
    model, variables, images = _net("basic")

    def loss(params, model):
        given = variables | {"params": params}
        logits, _ = model.apply(given, images, instance=SDPointInstance(2, 0.5), train=True, mutable=["batch_stats"])
        return (logits**2).sum()

    gradient = functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK_TO_COMPILE)(jax.grad(loss))
    kept, recomputed = (gradient(variables["params"], model.clone(remat=remat)) for remat in (False, True))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest), kept, recomputed)


def test_a_block_is_traced_once_for_each_shape_whatever_the_instance():
    # Images of a size that no other test has traced.
    model = create_model("wrn40_1", 10)
    images = jnp.zeros((2, 17, 16, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    traced = []

    def count(call, args, kwargs, context):
        if isinstance(context.module, PreActivationBlock):
            traced.append(context.method_name)
        return call(*args, **kwargs)

    def trace(instance):
        traced.clear()
        with nn.intercept_methods(count):
            apply = functools.partial(model.apply, instance=instance, train=True, mutable=["batch_stats"])
            jax.eval_shape(apply, variables, images)
        return len(traced)

    # Of 3 * 6 blocks, one of the first stage; of the others the first, which projects, and one more.
    assert trace(FULL_RESOLUTION) == 1 + 2 + 2
    assert trace(SDPointInstance(2, 0.5)) == 1 + 2 + 2
    assert trace(SDPointInstance(3, 0.5)) == trace(SDPointInstance(4, 0.5)) == 0


def test_the_instance_is_static():
    model, variables, images = _net("basic")
    program = jax.make_jaxpr(functools.partial(model.apply, instance=SDPointInstance(1, 0.5), train=False))
    text = str(program(variables, images))
    assert "cond" not in text and "while" not in text and "switch" not in text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_a_net_with_a_max_pool_has_the_stem_point(name):
    model = create_model(name, num_classes=10)
    has_max_pool = model.architecture.stem_convolution.kernel == 7
    assert any(instance.point == STEM for instance in model.instances()) == has_max_pool
    assert len(model.instances()) == 1 + 2 * (model.num_blocks + has_max_pool)


@pytest.mark.parametrize(
    "name, blocks",
    [("resnet18", 8), ("resnet50", 16), ("preresnet101", 33), ("resnext152", 50), ("preresnet200", 66)]
    + [("resnet20", 9), ("preresnet110", 54), ("preresnet164", 54), ("wrn28_10", 12), ("resnext29_8x64d", 9)]
    + [("wrn16_1", 6), ("wrn40_2", 18)],
)
def test_nets_have_the_published_number_of_blocks(name, blocks):
    assert architecture(name).num_blocks == blocks


PUBLISHED_PARAMETERS = {
    # He et al. 2016, table 6 (in millions 0.27, 0.46, 0.66, 0.85, 1.7, 19.4), counted by the authors' formula.
    "resnet20": (10, 269_722),
    "resnet32": (10, 464_154),
    "resnet44": (10, 658_586),
    "resnet56": (10, 853_018),
    "resnet110": (10, 1_727_962),
    "resnet1202": (10, 19_421_274),
    "wrn28_10": (10, 36_479_194),  # Zagoruyko & Komodakis 2016.
    "resnet18_cifar": (10, 11_173_962),  # kuangliu/pytorch-cifar.
    # torchvision's.
    "resnext101_32x8d": (1000, 88_791_336),
    "resnext101_64x4d": (1000, 83_455_272),
    "wide_resnet50_2": (1000, 68_883_240),
    "wide_resnet101_2": (1000, 126_886_696),
    "resnet50.a1_in1k": (1000, 25_557_032),
    # Counted layer by layer: half as wide as He et al.'s.
    "resnet20_w8": (10, 68_050),
    # As small nets were before they had their papers' shortcuts.
    "resnet20_projection_norm": (10, 272_474),
    "wrn28_10_projection_norm": (10, 36_479_194 + 2 * (160 + 320 + 640)),
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_nets_have_the_published_number_of_parameters(name):
    classes, expected = PUBLISHED_PARAMETERS[name]
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(create_model(name, classes).init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_any_net_can_have_any_shortcut():
    for kind in ("projection_norm", "projection", "padded_identity"):
        for name in ("resnet50", "resnet20", "wrn16_4"):
            assert architecture(f"{name}_{kind}") == dataclasses.replace(architecture(name), shortcut=kind)
    with pytest.raises(ValueError, match="model 'resnet20_identity': .*padded_identity"):
        architecture("resnet20_identity")


@pytest.mark.parametrize("channels, size", [(1, (37, 53)), (3, (32, 64)), (4, (33, 32))])
def test_any_channels_sizes_and_classes_will_do(channels, size):
    model = create_model("resnet18", num_classes=7)
    images = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    for instance in (FULL_RESOLUTION, SDPointInstance(STEM, 0.75), SDPointInstance(8, 0.5)):
        logits = jax.eval_shape(functools.partial(model.apply, instance=instance, train=False), variables, images)
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_initial_weights_are_the_authors():
    model = ResNet(architecture=Architecture((1, 1), 16, 16, stem=16, imagenet_stem=False), num_classes=100)
    init = jax.jit(functools.partial(model.init, train=False), compiler_options=QUICK_TO_COMPILE)
    params = init(jax.random.key(0), IMAGES)["params"]
    kernel = params["block_02"]["conv1"]["kernel"]  # From 16 features to 32.
    expected = np.sqrt(2 / (3 * 3 * 32))
    # The deviation of n draws is off by its 1 / sqrt(2 n) part; five of these.
    np.testing.assert_allclose(kernel.std(), expected, rtol=5 / np.sqrt(2 * kernel.size))
    assert abs(kernel.mean()) < 5 * expected / np.sqrt(kernel.size)
    assert (params["block_02"]["norm1"]["scale"] == 1).all() and (params["block_02"]["norm1"]["bias"] == 0).all()
    bound = 1 / np.sqrt(32)
    assert 0.99 * bound < params["head"]["dense"]["kernel"].max() <= bound


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("resnet51", {}, "model 'resnet51': valid are resnet5.*module:Class"),
        ("wrn27_10", {}, "model 'wrn27_10'"),
        ("wrn28_0", {}, "model 'wrn28_0'"),
        ("resnet18", {"num_classes": 0}, "num_classes 0: at least 1"),
        ("resnet18", {"dtype": "float16"}, "dtype 'float16': valid are float32, bfloat16"),
    ],
)
def test_an_unknown_net_is_an_error_that_names_the_known(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 10} | settings)


@pytest.mark.parametrize(
    "name, instance, message",
    [
        ("resnet20", SDPointInstance(10, 0.5), r"p10_r0.50: the net has no point 10; it has 0 .* and 1 to 9"),
        ("resnet20", SDPointInstance(STEM, 0.5), r"stem_r0.50: the net has no point -1; it has 0 "),
        ("resnet18", SDPointInstance(9, 0.5), r"p09_r0.50: .* it has -1 \(stem\), 0 .* and 1 to 8"),
    ],
)
def test_an_instance_beyond_the_net_is_an_error(name, instance, message):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(create_model(name, 10).init, instance=instance, train=False)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), images)


@pytest.mark.parametrize("name, smallest", [("resnet18", 32), ("wrn16_1", 4), ("resnet20", 4)])
def test_images_too_small_for_the_net_are_an_error(name, smallest):
    init = functools.partial(create_model(name, 10).init, train=False)
    jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, smallest, smallest, 3), jnp.float32))
    message = f"image size {smallest}x{smallest - 1}: too small for the net, which needs sides of at least {smallest}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct((1, smallest, smallest - 1, 3), jnp.float32))
