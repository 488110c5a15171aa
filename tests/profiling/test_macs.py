"""Costs read off the nets are the published ones, the ones of an earlier table written by hand, and what modules do."""

import functools
import hashlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import commands
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import ResNet
from sdpoint_jax.profiling.macs import Cost, LayerCost, count_cost, count_macs, count_suffix_macs, list_layers

ROOT = pathlib.Path(__file__).parents[2]
# torchvision's published figures at 224 x 224 for 1000 classes: billions of multiply-accumulates, parameters.
TORCHVISION = {
    "resnet18": (1.814, 11_689_512),
    "resnet34": (3.664, 21_797_672),
    "resnet50": (4.089, 25_557_032),
    "resnext50_32x4d": (4.230, 25_028_904),
}
# Of all instances at 0.5 and 0.75, for 1000 classes at 224 x 224 or 10 at 32 x 32, as a table written by hand counted
# them: sums of MACs, the parameters, sums of activations and of the MACs after each point, and a digest of all layers.
COUNTED = {
    "resnet18": (26_135_670_784, 11_689_512, 41_269_432, 6_783_791_104, "9cb4cd277b28898a"),
    "preresnet101": (386_012_233_728, 44_549_288, 908_678_536, 106_144_956_416, "f06de44095001bee"),
    "resnext50": (108_083_724_288, 25_028_904, 418_444_472, 30_556_585_984, "2f552c8d1aa08307"),
    "resnet20": (581_357_440, 269_722, 3_025_598, 129_404_800, "33ecac52b7c4703a"),
    "preresnet20": (584_937_344, 272_282, 3_200_702, 130_363_264, "10b328a78d26e6df"),
    "resnet20_projection_norm": (584_937_344, 272_474, 3_200_702, 130_363_264, "fb2481e4281c1d30"),
    "resnext29_8x64d": (76_179_306_496, 34_426_698, 134_402_238, 17_911_969_792, "84669b35384be20a"),
    "wrn10_1": (74_436_992, 77_850, 543_814, 8_950_144, "a41ac7eb078f7818"),
}
NETS = [
    ResNet(architecture=Architecture((2, 1), 8, 8, stem=8, imagenet_stem=False), num_classes=5),
    ResNet(architecture=Architecture((1, 2), 8, 16, preactivation=True, stem=8, imagenet_stem=False), num_classes=5),
    ResNet(architecture=Architecture((2, 1, 1), 8, 16, bottleneck=True, stem=8, groups=2), num_classes=5),
    ResNet(architecture=Architecture((1, 2), 8, 16, bottleneck=True, preactivation=True, stem=8), num_classes=5),
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_full_resolution_costs_what_torchvision_publishes(name):
    giga_macs, params = TORCHVISION[name]
    counted = count_cost(create_model(name, num_classes=1000), FULL_RESOLUTION, 224)
    assert round(counted.macs / 1e9, 3) == giga_macs
    assert counted.params == params
    assert counted.flops == 2 * counted.macs


@pytest.mark.parametrize("depth", [18, 50])
def test_a_preresnet_costs_what_the_resnet_of_its_depth_does(depth):
    post, pre = (
        count_cost(create_model(f"{family}{depth}", 1000), FULL_RESOLUTION, 224) for family in ("resnet", "preresnet")
    )
    assert pre.macs == post.macs and pre.activations == post.activations
    # First BatchNorms normalise the block's input; one more stands before the head. Few of 10 to 60 million.
    assert abs(pre.params - post.params) < 5000


@pytest.mark.parametrize("name", COUNTED)
def test_every_instance_costs_what_a_table_by_hand_counted(name):
    is_small = re.search("20|29|wrn", name)
    model, size = (create_model(name, 10), 32) if is_small else (create_model(name, 1000), 224)
    instances = model.instances()
    start = time.process_time()
    costs = [count_cost(model, instance, size) for instance in instances]
    assert time.process_time() - start < 5  # Depth 101, 69 instances: below 2 seconds of a CPU in November 2026.
    after = [count_suffix_macs(model, one, model.last_shared_point(one), size) for one in instances]
    sums = sum(cost.macs for cost in costs), costs[0].params, sum(cost.activations for cost in costs), sum(after)
    lines = [
        " ".join(map(str, (one, layer.name, "x".join(map(str, layer.output)), *layer[2:])))
        for one in instances
        for layer in sorted(list_layers(model, one, size))
    ]
    assert (*sums, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == COUNTED[name]
    assert [count_macs(model, one, size) for one in instances] == [cost.macs for cost in costs]


def test_resnet50_has_the_activations_of_the_regnet_paper():
    # Radosavovic et al. 2020, table 2: 11.1 million for ResNet-50.
    counted = count_cost(create_model("resnet50", 1000), FULL_RESOLUTION, 224)
    assert round(counted.activations / 1e6, 1) == 11.1
    assert counted.activation_bytes() == 4 * counted.activations
    assert counted.activation_bytes(jnp.bfloat16) == counted.activation_bytes("bfloat16") == 2 * counted.activations


@pytest.mark.parametrize("model", NETS)
def test_the_count_is_what_the_net_does_for_every_instance(model, size=(37, 51), channels=1):
    for instance in model.instances(ratios=(0.3,)):
        layers = {layer.name: layer for layer in list_layers(model, instance, size, channels)}
        assert layers == _traced_layers(model, instance, size, channels), instance.name
        traced = [layer[2:] for layer in layers.values()]
        assert count_cost(model, instance, size, channels) == Cost(*map(sum, zip(*traced)))


def _traced_layers(model, instance, size, channels):
    """The layers with parameters that a forward pass calls, by name, with what their shapes cost."""
    layers = {}

    def record(next_function, args, kwargs, context):
        output = next_function(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, (nn.Conv, nn.Dense, nn.BatchNorm)):
            name = "/".join(context.module.path)
            layers[name] = _layer_cost(name, context.module, output)
        return output

    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    with nn.intercept_methods(record):
        init = functools.partial(model.init, instance=instance, train=False)
        jax.eval_shape(init, jax.random.key(0), images)
    return layers


def _layer_cost(name, module, output):
    shape = (1, 1, *output.shape[1:])[-3:]
    params = sum(leaf.size for leaf in jax.tree.leaves(module.variables["params"]))
    if isinstance(module, nn.BatchNorm):
        return LayerCost(name, shape, 0, params, 0)
    kernel = module.variables["params"]["kernel"]
    return LayerCost(name, shape, shape[0] * shape[1] * kernel.size, params, output.size)


@pytest.mark.parametrize("name, size", [("resnet50", 224), ("preresnet20", 32)])
def test_a_downsampled_instance_costs_less_than_full_resolution(name, size):
    model = create_model(name, 1000)
    full = count_macs(model, FULL_RESOLUTION, size)
    macs = {instance: count_macs(model, instance, size) for instance in model.instances()[1:]}
    last = {instance for instance in macs if instance.point == model.num_blocks}
    # After the last block only the head is left, whose MACs do not depend on the resolution.
    assert {instance for instance in macs if macs[instance] == full} == last
    assert all(count < full for instance, count in macs.items() if instance not in last)
    halved = [count for instance, count in macs.items() if instance.ratio == 0.5]
    assert halved == sorted(halved)


def test_a_stem_instance_costs_what_its_shapes_say():
    # Stem 112 x 112, its max-pool to 28 instead of 56: all blocks at a quarter of the cells.
    layers = list_layers(create_model("resnet18", 1000), SDPointInstance(STEM, 0.5), 224)
    full = list_layers(create_model("resnet18", 1000), FULL_RESOLUTION, 224)
    assert layers[0] == full[0] == LayerCost("stem/conv", (112, 112, 64), 112 * 112 * 49 * 3 * 64, 9408, 112 * 112 * 64)
    by_name = {layer.name: layer for layer in layers}
    assert by_name["block_01/conv1"].output == (28, 28, 64)
    assert by_name["block_08/conv2"].output == (4, 4, 512)


@pytest.mark.parametrize(
    "instance, size, channels, message",
    [
        (SDPointInstance(9, 0.5), 224, 3, "p09_r0.50: the net has no point 9"),
        (FULL_RESOLUTION, 31, 3, "image size 31x31: too small"),
        (FULL_RESOLUTION, (224, 8), 3, "image size 224x8: too small"),
        (FULL_RESOLUTION, 224, 0, "channels 0: at least 1"),
    ],
)
def test_what_the_net_cannot_run_has_no_cost(instance, size, channels, message):
    with pytest.raises(ValueError, match=message):
        count_macs(create_model("resnet18", 10), instance, size, channels)


def test_the_command_prints_every_instance_with_its_relative_cost(capsys):
    commands.run("cost", "--model=resnet50", "--image-size=224", "--ratios=0.5")
    header, *rows, footer, checked = capsys.readouterr().out.splitlines()
    model = create_model("resnet50", 1000)
    instances = model.instances((0.5,))
    assert [row.split()[0] for row in rows] == [instance.name for instance in instances]
    assert rows[0].split()[1:4] == ["4.0892", "8.1784", "100.0%"]
    full = count_macs(model, FULL_RESOLUTION, 224)
    relative = [f"{count_macs(model, instance, 224) / full:.1%}" for instance in instances]
    assert [row.split()[3] for row in rows] == relative
    assert "25,557,032 parameters" in footer and "ResNet keeps the contract: 16 blocks, 18 instances" in checked


def test_the_command_lists_the_layers_of_an_instance(capsys):
    arguments = ["--model=preresnet20", "--image-size=32x28", "--channels=1", "--num-classes=10", "--layers=p03_r0.50"]
    commands.run("cost", *arguments)
    rows = capsys.readouterr().out.splitlines()
    model, instance = create_model("preresnet20", 10), SDPointInstance(3, 0.5)
    assert [row.split()[0] for row in rows[1:-1]] == [layer.name for layer in list_layers(model, instance, 32)]
    assert re.findall(r"[0-9,]+", rows[-1])[0] == f"{count_macs(model, instance, (32, 28), 1):,}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model=resnet51", "--image-size=224"], "model 'resnet51': valid are resnet56"),
        (["--model=resnet50", "--image-size=big"], "'big': valid are a side, 224, or"),
        (["--model=resnet50", "--image-size=16"], "image size 16x16: too small"),
        (["--model=resnet50", "--image-size=224", "--ratios=1.5"], "ratio 1.5"),
        (["--model=resnet50", "--image-size=224", "--ratios=half"], "'half': valid are numbers"),
        (["--model=resnet50", "--image-size=224", "--layers=p17_r0.50"], "p17_r0.50: the net has no point 17"),
        (["--model=resnet50"], "required: --image-size"),
    ],
)
def test_a_wrong_argument_of_the_command_is_one_line_and_an_exit_code(arguments, message, capsys):
    assert message in commands.error_of(capsys, "cost", *arguments)


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sdpoint_jax", "cost", "--model=resnet20", "--image-size=32"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_command_leaves_the_signals_of_its_process_as_they_were(capsys):
    before = signal.getsignal(signal.SIGPIPE)
    commands.run("cost", "--model=resnet20", "--image-size=32")
    assert signal.getsignal(signal.SIGPIPE) == before
