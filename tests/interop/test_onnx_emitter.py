"""What JAX computes, the graph computes, in either order of a map's axes; what it cannot is named."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from sdpoint_jax.models.downsample import OPERATIONS
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.models.trace import flatten

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from sdpoint_jax.interop.inference_trace import fold, symbolic_batch  # noqa: E402
from sdpoint_jax.interop.onnx_emitter import Emitter  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((2, 6, 8, 4), np.float32)
KERNEL = RNG.standard_normal((1, 1, 4, 4), np.float32)
LARGE = RNG.standard_normal((3, 2, 4, 4), np.float32)
MATRIX = RNG.standard_normal((8, 5), np.float32)
TABLE = RNG.standard_normal((3, 4), np.float32)
MAP = RNG.standard_normal((1, 6, 8, 4), np.float32)


def mixed(x):
    """A map whose channels come first in the graph."""
    return lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def smallest(x):
    """The smallest element of each window, as `nn.max_pool` finds the largest."""
    return lax.reduce_window(x, np.inf, lax.min, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


def scanned(x, reverse):
    """Steps with a parameter of their own each, and a result of each."""

    def step(x, row):
        x = nn.relu(x * row) + 1
        return x, x.mean((1, 2))

    x, means = lax.scan(step, x, TABLE, reverse=reverse)
    return x * means[1, :, None, None]


def graph_of(function, images=IMAGES):
    """The graph of a function of one array."""
    shape = jax.ShapeDtypeStruct((symbolic_batch(), *images.shape[1:]), images.dtype)
    with programs_for(Target("onnx")), jax.numpy_rank_promotion("allow"):
        program = flatten(jax.make_jaxpr(function)(shape), "onnx")
    emitter = Emitter()
    emitter.emit(fold(program, program.inputs[0], {}), "logits")
    for tensor in emitter.tensors:
        if tensor.name in emitter.weights:
            tensor.raw_data = emitter.weights[tensor.name].tobytes()
    given, taken = (
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), sides)
        for name, dtype, sides in (
            ("images", images.dtype, ["batch", *images.shape[1:]]),
            ("logits", program.outputs[0].aval.dtype, None),
        )
    )
    graph = onnx.helper.make_graph(emitter.nodes, "graph", [given], [taken], emitter.tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def computed(model, images=IMAGES):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


FUNCTIONS = {
    "every_second": lambda x: x[:, 1::2, ::-3],
    "one_element": lambda x: x[:, 0, :, -1],
    "a_range_and_a_step": lambda x: x[:, 1:4, ::2, :3],
    "a_list_of_indices": lambda x: jnp.take(x, jnp.array([2, 0, 3]), axis=3),
    "indices_that_are_computed": lambda x: jnp.take(TABLE, x[:, 0].argmax(-1) % 3, axis=0),
    "merged_and_split_axes": lambda x: x.reshape(-1, 48, 4).reshape(-1, 3, 2, 4, 2, 2, 2).mean((2, 4)),
    "channels_in_groups": lambda x: x.reshape(*x.shape[:3], 2, 2).swapaxes(3, 4).reshape(x.shape),
    "patches": lambda x: x.reshape(-1, 3, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3, 4, 16),
    "a_batch_in_an_axis": lambda x: (x.reshape(-1, 4) @ TABLE.T).reshape(x.shape[0], -1),
    "products_along_each_axis": lambda x: jnp.einsum("bhwc,wk->bhkc", x, MATRIX) + x[:, :, :5] @ KERNEL[0, 0],
    "a_product_from_the_left": lambda x: jnp.einsum("kw,bhwc->bkhc", MATRIX.T, x),
    "a_product_of_two_axes": lambda x: jnp.einsum("bhwc,wck->bhk", x, np.ones((8, 4, 3), np.float32)),
    "a_product_of_two_values": lambda x: jnp.einsum("bhwc,bkwc->bhkc", x, x[:, :3]),
    "concatenated_and_stacked": lambda x: jnp.stack([jnp.concatenate([x, 0 * x[..., :2]], -1)] * 2, 1),
    "split": lambda x: [part * i for i, part in enumerate(jnp.split(x, 2, axis=-1), 1)][1],
    "zeros_as_large_as_the_batch": lambda x: jnp.concatenate([jnp.zeros((x.shape[0], 6, 8, 1)), x], axis=-1),
    "padding_and_cropping": lambda x: lax.pad(x, 0.5, [(0, 0, 0), (2, -1, 0), (-1, 2, 0), (0, 1, 0)]),
    "rolled_and_repeated": lambda x: jnp.repeat(jnp.roll(x, 2, axis=1), 2, axis=2),
    "largest_and_smallest": lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME") + smallest(x),
    "averages_without_padding": lambda x: nn.avg_pool(x, (3, 2), (2, 1), "SAME", count_include_pad=False),
    "windows_along_one_axis": lambda x: nn.max_pool(x[:, 0], (3,), (2,)) + x.sum((1, 2), keepdims=True)[:, 0],
    "comparisons": lambda x: (
        jnp.where((x > 0) & ~(x >= 1) | (x < -1) | (x == 2), x, 0 * x) * (x.max(-1, keepdims=True) != x)
    ),
    "clipped": lambda x: jnp.clip(x, -0.5, 1) + lax.clamp(-1.0, x, 0.5) + jnp.maximum(x, 0.3) + jnp.minimum(x, 6),
    "clipped_by_values": lambda x: lax.clamp(-abs(x), x + 1, x * x) + jnp.clip(x, x.min(), 0.2 * MAP),
    "scanned_both_ways": lambda x: scanned(x, False) + scanned(x, True),
    "transposed_convolutions": lambda x: (
        lax.conv_transpose(x, LARGE, (2, 3), "SAME") + lax.conv_transpose(x, LARGE, (2, 3), "VALID")[:, :12, :24]
    ),
    "roots_and_powers": lambda x: jnp.sqrt(x**2 + 1) + lax.rsqrt(x * x + 1) + (x**2 + 1) ** 0.3 + 1 / (1 + x**4),
    "exponentials": lambda x: jnp.expm1(x) + jnp.log1p(x * x) + jnp.exp2(x) + nn.log_softmax(x) + nn.logsumexp(x),
    "activations": lambda x: nn.elu(x) + nn.celu(x) + nn.softplus(x) + nn.hard_tanh(x) + nn.selu(x) + nn.soft_sign(x),
    "affine_steps": lambda x: 1 - (2 * (x + np.arange(4, dtype=np.float32)) / 4 - 0.5) * 3,
    "steps_from_one_value": lambda x: (lambda y: (y + 1) * y + nn.relu(2 * y - x))(3 * x + 2),
    "a_map_is_added": lambda x: (x + MAP) * MAP - MAP * 2,
    "squeezed": lambda x: jnp.squeeze(x[:, :1], 1)[:, None] + jnp.expand_dims(x[:, 0], 2).squeeze(2)[:, None],
    "integers": lambda x: (jnp.round(3 * x).astype(jnp.int32) * 2 - 1).astype(jnp.float32) + jnp.floor(x) + jnp.sign(x),
    "running_sums": lambda x: jnp.cumsum(x, axis=1) + jnp.cumsum(x[:, ::-1], axis=2),
    "all_and_any": lambda x: (x > 0).any((1, 2)).astype(jnp.float32) + (x > -1).all((1, 2)),
    "statistics": lambda x: x.std((1, 2)) + x.var(-1).mean(1).sum(-1, keepdims=True) + jnp.linalg.norm(x, axis=(1, 2)),
    **{f"downsampled_by_{name}": (lambda x, shrink=shrink: shrink(x, (3, 6))) for name, shrink in OPERATIONS.items()},
    "downsampled_oddly": lambda x: OPERATIONS["avg"](x, (4, 5)) + OPERATIONS["max"](x, (4, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_the_function(name):
    function = FUNCTIONS[name]
    for each in (function, lambda x: function(mixed(x))):
        with jax.numpy_rank_promotion("allow"):
            expected = np.asarray(each(jnp.asarray(IMAGES)), np.float32)
        found = computed(graph_of(each))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def kinds(function):
    return collections.Counter(node.op_type for node in graph_of(function).graph.node)


def block(x):
    x = mixed(x)
    for _ in range(2):
        y = mixed(x)
        y = (y - np.arange(4, dtype=np.float32)) * lax.rsqrt(np.ones(4, np.float32)) * 0.5 + 1
        x = x + mixed(nn.relu(y))
    return x.mean((1, 2))


def test_maps_stay_channels_first_and_norms_are_one_node_each():
    expected = {"Transpose": 1, "Conv": 5, "BatchNormalization": 2, "Relu": 2, "Add": 2, "GlobalAveragePool": 1}
    assert kinds(block) == {**expected, "Flatten": 1}


def test_a_bias_is_a_part_of_the_convolution_unless_the_output_is_used_without():
    assert kinds(lambda x: nn.relu(mixed(x) + 1.0)) == {"Transpose": 2, "Conv": 1, "Relu": 1}
    assert kinds(lambda x: (lambda y: nn.relu(y + 1.0) * y)(mixed(x)))["Add"] == 1


@pytest.mark.parametrize(
    "function, expected",
    [
        (nn.softmax, {"Softmax": 1}),
        (nn.relu6, {"Clip": 1}),
        (nn.hard_swish, {"HardSwish": 1}),
        (nn.hard_sigmoid, {"HardSigmoid": 1}),
        (lambda x: nn.gelu(x, approximate=False), {"Div": 1, "Erf": 1, "Add": 1, "Mul": 2}),
        (lambda x: nn.gelu(x), {"Pow": 1, "Mul": 4, "Add": 2, "Tanh": 1}),
    ],
)
def test_functions_that_onnx_knows_are_found(function, expected):
    assert kinds(function) == expected


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}, {"use_fast_variance": False}])
def test_a_layer_norm_is_one_node(options):
    norm = nn.LayerNorm(epsilon=0.1, **options)
    params = {"scale": jnp.asarray(TABLE[0]), "bias": jnp.asarray(TABLE[1])}
    params = {name: array for name, array in params.items() if options.get(f"use_{name}", True)}

    def function(x):
        return norm.apply({"params": params}, x)

    assert kinds(function) == {"LayerNormalization": 1}
    np.testing.assert_allclose(computed(graph_of(function)), function(IMAGES), atol=1e-5)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: jnp.sort(x), "ONNX has no form of the primitive sort, in the network"),
        (lambda x: lax.pad(x, 0.0, [(0, 0, 1)] * 4), "primitive pad .padding between elements., in the network"),
        (lambda x: lax.fori_loop(0, x.max().astype(int), lambda i, x: x + 1, x), "of the primitive while, in"),
        (
            jax.named_scope("head")(lambda x: x[:, [0, 1], [1, 0]]),
            "gather .indices into several axes at once., in head",
        ),
    ],
)
def test_what_has_no_form_is_named_with_its_module(function, message):
    with pytest.raises(ValueError, match=message):
        graph_of(function)
