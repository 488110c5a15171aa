"""Costs are read off any network that keeps the contract: its own layers, products, pools, and what equals what."""

import commands
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models import downsample
from sdpoint_jax.models.net import SDPointNet
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.profiling.check import check_model
from sdpoint_jax.profiling.macs import count_cost, count_macs, distinct_instances, format_instances, list_layers
from sdpoint_jax.profiling.parts import list_operations
from sdpoint_jax.profiling.roofline import list_passes


class Layers(nn.Module):
    """A part whose `__call__` is a function of (module, x, train)."""

    run: object

    @nn.compact
    def __call__(self, x, train):
        return self.run(self, x, train)


class Net(SDPointNet):
    """A network of functions; the stem is a 3x3 convolution to 8 channels, the head an average and a dense layer."""

    block: object = None
    depth: int = 2
    head_of: object = None
    stem_of: object = None

    def setup(self):
        self.stem = Layers(self.stem_of or (lambda _, x, train: nn.Conv(8, (3, 3), name="conv")(x)))
        self.blocks = [Layers(self.block, name=f"block_{k}") for k in range(1, self.depth + 1)]
        self.head = Layers(self.head_of or (lambda _, x, train: nn.Dense(5, name="dense")(x.mean((1, 2)))))


def _convolve(features=8, **kwargs):
    return lambda _, x, train: nn.Conv(features, (3, 3), name="conv", **kwargs)(x)


def _net(block, **kwargs):
    return Net(num_classes=5, block=block, **kwargs)


def _layers(model, instance=FULL_RESOLUTION, size=8):
    return {layer.name: layer[1:] for layer in list_layers(model, instance, size)}


def _kinds(model, size=8):
    return [(one.kind, one.name) for one in list_operations(model, FULL_RESOLUTION, size) if "block_1" in one.name]


def _mobile(module, x, train):
    y = nn.Conv(16, (1, 1), name="expand")(x)
    y = nn.Conv(16, (5, 5), feature_group_count=16, use_bias=False, name="depthwise")(y)
    y = nn.swish(nn.BatchNorm(use_running_average=not train, name="norm")(y))
    gate = nn.sigmoid(nn.Dense(16, name="gate")(y.mean((1, 2), keepdims=True)))
    return x + nn.Conv(8, (1, 1), use_bias=False, name="project")(y * gate)


def test_depthwise_convolutions_and_squeeze_excitation_are_counted_and_named():
    model, cells = _net(_mobile), 64
    layers = _layers(model)
    assert layers["block_1/expand"] == ((8, 8, 16), cells * 8 * 16, 8 * 16 + 16, cells * 16)
    assert layers["block_1/depthwise"] == ((8, 8, 16), cells * 16 * 25, 16 * 25, cells * 16)
    assert layers["block_1/norm"] == ((8, 8, 16), 0, 32, 0)
    assert layers["block_1/gate"] == ((1, 1, 16), 16 * 16, 16 * 16 + 16, 16)
    kinds = ["convolution", "convolution", "norm", "average_pool", "dense", "multiply", "convolution", "add"]
    assert [kind for kind, _ in _kinds(model)] == kinds
    halved = _layers(model, SDPointInstance(1, 0.5))
    assert halved["block_1/depthwise"] == layers["block_1/depthwise"]
    assert halved["block_2/depthwise"][1] == 16 * 16 * 25


def _next(module, x, train):
    y = nn.Conv(8, (7, 7), feature_group_count=8, name="depthwise")(x)
    y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm")(y)))
    scale = module.param("scale", nn.initializers.ones, (1, 1, 1, 8))
    return x + nn.Dense(8, name="down")(nn.GroupNorm(4, name="groups")(y)) * scale


def test_norms_of_their_own_statistics_and_layer_scale_hold_parameters_alone():
    layers = _layers(_net(_next))
    assert layers["block_1/norm"] == ((8, 8, 8), 0, 16, 0) and layers["block_1/groups"][1:] == (0, 64, 0)
    assert layers["block_1/scale"] == ((8, 8, 8), 0, 8, 0)
    assert layers["block_1/up"] == ((8, 8, 32), 64 * 8 * 32, 8 * 32 + 32, 64 * 32)
    kinds = ["convolution", "own_norm", "dense", "own_norm", "dense", "affine", "add"]
    assert [kind for kind, _ in _kinds(_net(_next))] == kinds  # GELU's own additions are elementwise.


def _attend(module, state, train):
    x, token = state
    batch, height, width, features = x.shape
    tokens = jnp.concatenate([token, x.reshape(batch, -1, features)], 1)
    tokens = tokens + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(tokens))
    return tokens[:, 1:].reshape(x.shape), tokens[:, :1]


class Tokens(Net):
    def downsample(self, x, ratio):
        return downsample.downsample(x[0], ratio), x[1]


def _with_token(module, x, train):
    return nn.Conv(8, (4, 4), (4, 4), name="patches")(x), module.param("token", nn.initializers.zeros, (1, 1, 8))


TOKENS = Tokens(
    num_classes=5,
    block=_attend,
    stem_of=_with_token,
    head_of=lambda _, x, train: nn.Dense(5, name="dense")(x[1][:, 0]),
)


def test_the_products_of_attention_count_and_shrink_with_the_tokens():
    layers = _layers(TOKENS, size=16)  # 4 x 4 patches and the class token.
    assert layers["block_1/attention/query"] == ((17, 2, 4), 17 * 8 * 8, 72, 17 * 8)
    assert layers["block_1/attention/product"] == ((2, 17, 17), 17 * 17 * 8, 0, 2 * 17 * 17)
    assert layers["block_1/attention/product2"][1:3] == (17 * 17 * 8, 0)
    assert layers["stem/token"] == ((1, 1, 8), 0, 8, 0)
    halved = _layers(TOKENS, SDPointInstance(1, 0.5), 16)
    assert halved["block_2/attention/product"][:2] == ((2, 5, 5), 5 * 5 * 8)
    kinds = [kind for kind, _ in _kinds(TOKENS, 16)]
    assert kinds[:2] == ["concatenate", "own_norm"] and kinds[-3:] == ["product", "dense", "add"]
    passes = {one.name for one in list_passes(TOKENS, FULL_RESOLUTION, 16, 2, training=True)}
    assert {"block_1/attention/product left_gradient", "block_1/attention/softmax forward"} <= passes


def test_parameters_of_all_layers_are_counted_once():
    for model in (_net(_mobile), _net(_next), TOKENS):
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))  # noqa: B023
        params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert {count_cost(model, instance, 16).params for instance in model.instances()} == {params}


def _twice(module, x, train):
    layer = nn.Conv(8, (3, 3), name="conv")
    return layer(layer(x))


def test_a_layer_that_is_used_twice_multiplies_twice_and_has_its_parameters_once():
    layers = [layer for layer in list_layers(_net(_twice), FULL_RESOLUTION, 8) if layer.name == "block_1/conv"]
    assert [(layer.macs, layer.params) for layer in layers] == [(64 * 9 * 64, 9 * 64 + 8), (64 * 9 * 64, 0)]


def test_dense_connections_read_and_write_the_concatenated_map():
    model = _net(lambda _, x, train: jnp.concatenate([x, nn.Conv(4, (3, 3), name="conv")(x)], -1))
    assert _layers(model)["block_2/conv"][1] == 64 * 9 * 12 * 4
    moved = {one.name: one.bytes for one in list_passes(model, FULL_RESOLUTION, 8, 1, training=False)}
    assert moved["block_2/concatenate forward"] == 4 * 2 * 64 * 16


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_platform_of_programs_changes_no_count(platform):
    def block(module, x, train):
        return lax.platform_dependent(x, cpu=lambda x: (x * 2) @ jnp.eye(8), default=lambda x: x) + _mobile(
            module, x, train
        )

    with programs_for(Target(platform)):
        assert count_macs(_net(block), SDPointInstance(1, 0.3), 9) == count_macs(
            _net(_mobile), SDPointInstance(1, 0.3), 9
        )


def test_a_scan_counts_its_rounds_and_a_loop_of_unknown_length_is_an_error():
    def scan(module, x, train):
        kernel = module.param("kernel", nn.initializers.ones, (8, 8))
        return lax.scan(lambda x, _: (x @ kernel, None), x, None, length=3)[0]

    def loop(module, x, train):
        kernel = module.param("kernel", nn.initializers.ones, (8, 8))
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ kernel, x)

    operations = [one for one in list_operations(_net(scan), FULL_RESOLUTION, 8) if one.name == "block_1"]
    assert [(one.macs, one.params) for one in operations] == [(64 * 64, 64), (64 * 64, 0), (64 * 64, 0)]
    with pytest.raises(ValueError, match="block_1: the number of rounds of a while loop is not known"):
        count_macs(_net(loop), FULL_RESOLUTION, 8)


def test_a_small_map_that_a_ratio_leaves_as_it_is_is_full_resolution():
    model = _net(_convolve(strides=2), depth=3)  # From 8 to 4, 2 and 1.
    kept, dropped = distinct_instances(model, model.instances(), 8)
    names = [instance.name for instance in kept]
    assert names == ["full", "p01_r0.50", "p01_r0.75", "p02_r0.50"]
    reasons = {instance.name: reason for instance, reason in dropped.items()}
    assert reasons["p02_r0.75"] == "leaves 2x2x8 as it is, so it is full"
    assert list(reasons) == ["p02_r0.75", "p03_r0.50", "p03_r0.75"]


def test_ratios_that_give_the_same_size_or_that_a_block_rounds_to_the_same_are_one():
    same = distinct_instances(_net(_convolve()), _net(_convolve()).instances((0.6, 0.75)), 3)[1]
    assert {instance.name for instance in same} == {"p01_r0.60", "p02_r0.60"}
    assert "makes 2x2x8 of 3x3x8, so it is p01_r0.75" in same.values()
    model = _net(_convolve(strides=2, padding="VALID"), depth=2)
    # The first block gives 7 x 7: 5 and 6 cells are both 2 after the next one.
    _, rounded = distinct_instances(model, model.instances((0.7, 0.85), points=(0, 1)), 16)
    ((instance, reason),) = rounded.items()
    assert (instance.name, reason) == ("p01_r0.70", "costs what p01_r0.85 does: block_2 gives 2x2x8 in both")


def test_the_last_point_is_kept_and_marked_where_nothing_is_left_to_save():
    model = _net(_convolve())
    table = format_instances(model, model.instances((0.5,)), 8).splitlines()
    marked = [line.split()[0] for line in table if "no MACs left to save" in line]
    assert marked == ["p02_r0.50"]
    assert not any("is not listed" in line for line in table)


def test_an_instance_that_shrinks_what_nothing_reads_is_full_resolution():
    _, dropped = distinct_instances(TOKENS, TOKENS.instances((0.5,)), 16)
    assert list(dropped.items()) == [(SDPointInstance(2, 0.5), "shrinks what no later layer reads, so it is full")]


def test_a_sound_network_passes_the_check():
    assert check_model(_net(_mobile), 8) == (
        "Net keeps the contract: 2 blocks, 5 instances, prefix and suffix compute what the whole net does"
    )


def _flatten(module, x, train):
    return nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1))


class Scaled(Net):
    def __call__(self, images, *, instance=FULL_RESOLUTION, train):
        return super().__call__(images / 2, instance=instance, train=train)


class Stray(Net):
    def setup(self):
        super().setup()
        self.stray = nn.Dense(8)

    def after_point(self, x):
        return self.stray(x)


class Shared(SDPointNet):
    def setup(self):
        self.stem = Layers(_convolve(3))
        self.blocks = [Layers(lambda _, x, train: self.stem(x, train), name="block")]
        self.head = Layers(lambda _, x, train: nn.Dense(5)(x.mean((1, 2))))


@pytest.mark.parametrize(
    "model, message",
    [
        (_net(_convolve(), head_of=_flatten), r"Net, instance p01_r0.50: head on 4x4x8: .*shape \(512, 5\)"),
        (_net(lambda _, x, train: (x, x)), r"Net, instance full: block_1 on 8x8x8: .*block_1 returns"),
        (_net(lambda _, x, train: x[..., :4] + x), r"Net, instance full: block_1 on 8x8x8: TypeError: .*incompatible"),
        (_net(_convolve(kernel_dilation=9, padding="VALID")), "Net, instance full: block_1 on 8x8x8: "),
        (Scaled(num_classes=5, block=_convolve()), "Scaled: prefix and suffix at point -1 differ from the whole net"),
        (Stray(num_classes=5, block=_convolve()), "Stray: variables stray belong to no part; parts are stem, block_1"),
        (Shared(num_classes=5), r"block uses variables of stem \(stem/conv\)"),
        (nn.Dense(5), "Dense is no SDPointNet"),
    ],
)
def test_a_network_that_breaks_the_contract_is_one_line(model, message):
    with pytest.raises(ValueError, match=message) as error:
        check_model(model, 8)
    assert "\n" not in str(error.value)


def test_the_command_takes_a_network_of_the_users_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_for_cost.py").write_text(
        "from flax import linen as nn\n"
        "from sdpoint_jax import SDPointNet\n"
        "class Part(nn.Module):\n"
        "    width: int\n"
        "    classify: bool = False\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train):\n"
        "        return nn.Dense(self.width)(x.mean((1, 2)) if self.classify else x)\n"
        "class Mine(SDPointNet):\n"
        "    depth: int = 1\n"
        "    def setup(self):\n"
        "        self.stem = Part(4)\n"
        "        self.blocks = [Part(4) for _ in range(self.depth)]\n"
        "        self.head = Part(self.num_classes, True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--model=mine_for_cost:Mine", "--model-args=depth=2", "--num-classes=3", "--image-size=8"]
    commands.run("cost", *flags)
    *rows, params, checked = capsys.readouterr().out.splitlines()
    assert rows[2].split()[:2] == ["p01_r0.50", "0.0000"] and params.startswith("71 parameters")  # 16 + 2 * 20 + 15
    assert checked.startswith("Mine keeps the contract: 2 blocks, 5 instances")
    commands.run("cost", *flags, "--batch-size=4")
    assert "in float32 and batches of 4" in capsys.readouterr().out
    commands.run("cost", *flags, "--layers=p01_r0.50")
    assert "blocks_1/Dense_0" in capsys.readouterr().out
