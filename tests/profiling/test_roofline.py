"""Bytes and times counted from shapes are those of the stated assumptions, and near what compilers report."""

import dataclasses

import commands
import jax.numpy as jnp
import pytest

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import ResNet
from sdpoint_jax.profiling.roofline import DEVICES, Device, count_bytes, estimate_seconds, get_device, list_passes

# One block of two 3x3 convolutions of 4 channels behind a 3x3 stem, on images of 8 x 8 x 1; two classes.
TINY = ResNet(architecture=Architecture((1,), 4, 4, stem=4, imagenet_stem=False), num_classes=2)
X = 8 * 8 * 4  # Elements of every activation.
SLOW = Device("slow", 1e-6, 1e-6, 1e-3)  # A million operations and a million bytes a second.


def _bytes_of(name, **kwargs):
    arguments = dict(instance=FULL_RESOLUTION, image_size=8, batch_size=10, training=True, channels=1) | kwargs
    return {one.name: one.bytes for one in list_passes(TINY, **arguments)}[name]


@pytest.mark.parametrize(
    "name, elements, weights",
    [
        ("stem/conv forward", 8 * 8 * 1 + X, 9 * 4),
        ("stem/conv kernel_gradient", 8 * 8 * 1 + X, 9 * 4),
        ("block_01/conv2 input_gradient", 2 * X, 9 * 4 * 4),
        ("stem/norm forward", 2 * X, 0),
        ("stem/norm sums", 2 * X, 0),
        ("stem/norm input_gradient", 3 * X, 0),
        ("block_01/add forward", X, 0),
        ("block_01/add input_gradient", 3 * X, 0),
        ("head/pool forward", X + 4, 0),
        ("head/dense forward", 4 + 2, 4 * 2),
    ],
)
def test_a_pass_of_training_moves_these_bytes(name, elements, weights):
    assert _bytes_of(name) == 4 * (10 * elements + weights)


def test_the_pool_of_a_point_reads_the_large_and_writes_the_small_activation():
    assert _bytes_of("block_01/pool forward", instance=SDPointInstance(1, 0.5)) == 4 * 10 * (X + X // 4)
    small = 6 * 6 * 4  # Each period of 4 cells gives 3 averages of neighbours.
    assert _bytes_of("block_01/pool forward", instance=SDPointInstance(1, 0.75)) == 4 * 10 * (X + small)


@pytest.mark.parametrize(
    "size, ratio, height, width, backward",
    [
        # Windows of 2, 2, 2, 3, 2, 2 and 2 cells, twice; each average is written and read in float32, then written.
        (18, 0.75, 30 + 5 * 14, 30 + 5 * 14, 18 + 14),
        (19, 0.5, 28 + 5 * 10, 28 + 5 * 10, 19 + 10),  # Windows of 3 cells, the first and the last of 2.
    ],
)
def test_a_pool_of_irregular_windows_goes_along_one_side_after_the_other(size, ratio, height, width, backward):
    passes = list_passes(TINY, SDPointInstance(1, ratio), size, 1, training=True, channels=1)
    moved, out = {one.name: one.bytes for one in passes}, round(size * ratio)
    assert moved["block_01/pool forward"] == 4 * 4 * (size * height + out * width)
    assert moved["block_01/pool input_gradient"] == 4 * 4 * (size + out) * backward


def test_the_stems_own_pool_is_one_pass_at_any_size_and_an_adaptive_one_reads_each_window():
    def elements(instance, size):
        passes = list_passes(create_model("resnet18", 10), instance, size, 1, training=False)
        return {one.name: one.bytes for one in passes}["stem/pool forward"] / (4 * 64)

    assert elements(FULL_RESOLUTION, 150) == 75**2 + 38**2
    # From 112 to 42: 14 periods of 8 cells, windows of 3, 4 and 3, which are 3 apart with one cell before and behind.
    assert elements(SDPointInstance(STEM, 0.75), 224) == 112**2 + 42**2
    # From 104 to 39 as well; from 108 to 40, 4 periods of 27 cells have windows of 3 and 4 cells, 36 in all.
    assert elements(SDPointInstance(STEM, 0.75), 208) == 104**2 + 39**2
    assert elements(SDPointInstance(STEM, 0.75), 216) == (108 + 40) * (4 * 36 + 3 * 40)


def test_the_gradient_of_a_max_pool_reads_its_input_once_more():
    passes = list_passes(create_model("resnet18", 10), SDPointInstance(STEM, 0.5), 224, 1, training=True)
    before, after = 112 * 112 * 64, 28 * 28 * 64
    by_name = {one.name: one.bytes for one in passes}
    assert by_name["stem/pool forward"] == 4 * (before + after)
    assert by_name["stem/pool input_gradient"] == 4 * (2 * before + after)


def test_an_update_reads_three_of_each_parameter_and_writes_two():
    params = 9 * 4 + 2 * (9 * 4 * 4) + 3 * 2 * 4 + 4 * 2 + 2
    assert _bytes_of("update") == 5 * 4 * params


def test_norms_and_additions_of_inference_cost_no_pass_of_their_own():
    passes = list_passes(TINY, FULL_RESOLUTION, 8, 10, training=False, channels=1)
    moved = {one.name: one.bytes for one in passes}
    assert not any("norm" in name for name in moved)
    assert moved["block_01/add forward"] == 4 * 10 * X  # The shortcut; the convolution writes the sum.
    assert sum(moved.values()) == count_bytes(TINY, FULL_RESOLUTION, 8, 10, training=False, channels=1)


def test_activations_take_the_dtype_of_the_computation_and_weights_stay_float32():
    in_float32, in_bfloat16 = (
        count_bytes(TINY.clone(dtype=dtype), FULL_RESOLUTION, 8, 10, training=False, channels=1)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    weights = 4 * (9 * 4 + 2 * (9 * 4 * 4) + 4 * 2)
    assert 2 * (in_bfloat16 - weights) == in_float32 - weights


def test_training_has_three_products_per_layer_but_no_gradient_of_the_images():
    model = create_model("resnet50", 1000)
    forward, step = (
        sum(one.macs for one in list_passes(model, FULL_RESOLUTION, 224, 1, training=training))
        for training in (False, True)
    )
    assert step == 3 * forward - 112 * 112 * 64 * 49 * 3


def test_a_pass_takes_the_longer_of_its_arithmetic_and_its_bytes():
    one = {each.name: each for each in list_passes(TINY, FULL_RESOLUTION, 8, 1, training=False, channels=1)}
    convolution, add = one["block_01/conv1 forward"], one["block_01/add forward"]
    assert convolution.seconds(SLOW, jnp.float32) == pytest.approx(2 * 8 * 8 * 4 * 9 * 4 / 1e6)
    assert add.seconds(SLOW, jnp.float32) == pytest.approx(4 * X / 1e6)
    fast_memory = dataclasses.replace(SLOW, bandwidth_gbps=1e9)
    slow_memory = dataclasses.replace(SLOW, bandwidth_gbps=1e-6)
    assert convolution.seconds(fast_memory, jnp.float32) == convolution.seconds(SLOW, jnp.float32)
    assert convolution.seconds(slow_memory, jnp.float32) == pytest.approx(convolution.bytes / 1e3)


def test_the_dtype_picks_the_peak_rate():
    device = Device("any", 4.0, 2.0, 1.0)
    assert (device.peak_flops("bfloat16"), device.peak_flops(jnp.float32)) == (4e12, 2e12)


@pytest.mark.parametrize(
    "architecture, padded",
    [
        # Kernel matrices [9 * 4, 4] of one block of 64 x 64, and [9 * 16, 16] of three.
        (Architecture((1,), 4, 4, stem=4, imagenet_stem=False), 64 * 64),
        (Architecture((1,), 16, 16, stem=16, imagenet_stem=False), 3 * 64 * 64),
    ],
)
def test_a_matrix_unit_pads_kernels_to_whole_blocks(architecture, padded):
    unit = dataclasses.replace(SLOW, matrix_side=64, bandwidth_gbps=1e9)
    passes = {
        one.name: one
        for one in list_passes(ResNet(architecture=architecture, num_classes=2), FULL_RESOLUTION, 8, 1, training=False)
    }
    assert passes["block_01/conv1 forward"].seconds(unit, jnp.float32) == pytest.approx(2 * 8 * 8 * padded / 1e6)


def test_a_convolution_in_small_groups_takes_no_longer_than_one_without_groups():
    unit = dataclasses.replace(get_device("tpu-v5e"), bandwidth_gbps=1e9)
    grouped = create_model("resnext50", 10, dtype="bfloat16")
    dense = grouped.clone(architecture=dataclasses.replace(grouped.architecture, groups=1))
    in_groups, without = (
        {one.name: one.seconds(unit, net.dtype) for one in list_passes(net, FULL_RESOLUTION, 224, 128, training=False)}
        for net in (grouped, dense)
    )
    # Groups of 4 channels, of which a block of 128 holds 32; groups of 32, of which it is cheaper to take one by one.
    assert in_groups["block_01/conv2 forward"] == without["block_01/conv2 forward"]
    assert in_groups["block_16/conv2 forward"] < without["block_16/conv2 forward"]


@pytest.mark.parametrize(
    "name, instance, gigabytes",
    [("resnet50", "full", 47.9), ("resnet50", "p04_r0.50", 33.9), ("resnet18", "p02_r0.50", 8.12)],
)
def test_the_gradients_move_nearly_what_the_compiler_for_a_tpu_reports(name, instance, gigabytes):
    # XLA's "bytes accessed" of the compiled gradient program for TPU v5e, batch 128, bfloat16, libtpu 0.0.42.
    model = create_model(name, 1000, dtype="bfloat16")
    passes = list_passes(model, SDPointInstance.from_name(instance), 224, 128, training=True)
    moved = sum(one.bytes for one in passes if one.name != "update") / 1e9
    assert 0.8 * gigabytes < moved < gigabytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True])
def test_time_falls_less_than_macs_where_memory_is_the_limit(device, training):
    model, early = create_model("resnet50", 1000, dtype="bfloat16"), SDPointInstance(4, 0.5)
    full, part = (
        estimate_seconds(model, instance, 224, 128, get_device(device), training=training)
        for instance in (FULL_RESOLUTION, early)
    )
    assert 0.5 < part / full < 0.8  # 48 % of the MACs.


def test_an_unknown_device_an_impossible_rate_and_an_empty_batch_are_errors():
    with pytest.raises(ValueError, match="device 'v100': known are tpu-v4, .*h200"):
        get_device("v100")
    with pytest.raises(ValueError, match="bandwidth_gbps 0 of device any: must be more than 0"):
        Device("any", 1, 1, 0)
    with pytest.raises(ValueError, match="batch_size 0: at least 1"):
        count_bytes(TINY, FULL_RESOLUTION, 8, 0, training=False)


def test_the_command_prints_bytes_and_times_beside_macs(capsys):
    commands.run("cost", "--model=resnet50", "--image-size=224", "--ratios=0.5", "--device=tpu-v5e", "--batch-size=64")
    _, *rows, dtype, rates = capsys.readouterr().out.splitlines()
    model = create_model("resnet50", 1000, dtype="bfloat16")
    assert [row.split()[0] for row in rows] == [instance.name for instance in model.instances((0.5,))]
    assert rows[0].split()[2::2] == ["100.0%"] * 5
    moved, seconds = (
        f"{count(model, FULL_RESOLUTION, 224, 64, *device, training=True) * scale:.4g}"
        for count, device, scale in [(count_bytes, (), 1e-6 / 64), (estimate_seconds, (DEVICES["tpu-v5e"],), 1e3)]
    )
    assert (rows[0].split()[7], rows[0].split()[9]) == (moved, seconds)
    assert "bfloat16 and batches of 64" in dtype and "197 TFLOP/s, 819 GB/s" in rates


def test_the_command_takes_the_rates_of_any_device(capsys):
    command = ["cost", "--model=resnet20", "--image-size=32"]
    commands.run(*command, "--dtype=float32", "--peak-tflops=0.5", "--bandwidth-gbps=40")
    assert "0.5 TFLOP/s, 40 GB/s" in capsys.readouterr().out
    commands.run(*command, "--batch-size=16")
    assert "ms" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device=v100"], "device 'v100': known are"),
        (["--peak-tflops=1"], "both --peak-tflops and --bandwidth-gbps are needed"),
        (["--device=h100", "--bandwidth-gbps=-1"], "bandwidth_gbps -1.0 of device h100"),
        (["--device=h100", "--layers=full"], "--layers lists MACs"),
        (["--batch-size=0"], "batch_size 0: at least 1"),
        (["--dtype=float16"], "dtype 'float16': valid are float32, bfloat16"),
    ],
)
def test_wrong_flags_of_a_device_are_one_line(flags, message, capsys):
    assert message in commands.error_of(capsys, "cost", "--model=resnet20", "--image-size=32", *flags)
