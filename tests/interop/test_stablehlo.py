"""Exported programs give the predictor's logits without this package, on any platform, for any batch."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from interop import nets

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.target import ANY, Target, programs_for
from sdpoint_jax.storage import artefact

pytest.importorskip("flatbuffers")

from sdpoint_jax.interop import bundle, stablehlo  # noqa: E402

CHEAP = SDPointInstance(2, 0.75)

NEEDED = ("jax", "jaxlib", "numpy", "flatbuffers")
NEEDED_BY_JAX = ("ml_dtypes", "opt_einsum", "scipy")
ALONE = """
import importlib.util, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from load import Classifier
assert not any(importlib.util.find_spec(name) for name in ("sdpoint_jax", "flax", "optax", "safetensors"))
classifier, batches = Classifier(), np.load(sys.argv[2])
keys = [(row["instance"], size) for row in classifier.manifest["instances"] for size in batches]
np.savez(sys.argv[3], **{f"{name} {size}": classifier.classify(batches[size], name) for name, size in keys})
"""


def run_alone(folder, *arguments):
    """Runs `ALONE` where nothing is installed but jax, numpy and flatbuffers."""
    for name in NEEDED + NEEDED_BY_JAX:
        origin = pathlib.Path(importlib.util.find_spec(name).origin).parent
        for package in (origin, origin.with_name(f"{name}.libs")):
            if package.exists():
                (folder / package.name).symlink_to(package)
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-S", "-c", ALONE, *arguments]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def found(swept):
    return artefact.load(swept.folder / "artefact")


def test_a_fresh_process_without_this_package_and_flax_gives_the_predictors_logits(found, tmp_path):
    instances = [FULL_RESOLUTION, SDPointInstance(1, 0.5), CHEAP]
    bundle.write(found, instances, tmp_path / "exported")
    batches = {str(size): nets.images_of(found, size) for size in (1, 5, 16)}
    np.savez(tmp_path / "batches.npz", **batches)
    paths = [str(tmp_path / name) for name in ("exported", "batches.npz", "logits.npz")]
    (tmp_path / "installed").mkdir()
    run_alone(tmp_path / "installed", *paths)
    logits = nets.read_npz(tmp_path / "logits.npz")
    assert len(logits) == len(instances) * len(batches)
    for name, actual in logits.items():
        instance, size = name.split()
        assert nets.deviation(actual, nets.predicted(found, batches[size], instance)) <= 1e-5, name


@pytest.mark.parametrize("platform", stablehlo.PLATFORMS)
def test_each_platform_computes_pointwise_convolutions_in_its_own_way(monkeypatch, platform):
    nets.register(monkeypatch)
    swept = nets.artefact_of("tiny_resnext")
    module = stablehlo.export_program(swept, CHEAP, [platform]).mlir_module()
    convolutions, dots = (module.count(f"stablehlo.{kind}") for kind in ("convolution", "dot_general"))
    pointwise, others, classifier = 3 * 2 + 2, 1 + 3, 1
    assert (convolutions, dots) == {
        "cpu": (others, classifier + pointwise),
        "cuda": (others + pointwise, classifier),
        "tpu": (others + pointwise, classifier),
    }[platform]


def test_a_net_that_is_not_exported_holds_no_choice_of_platform():
    def jaxpr_of():
        model = tiny.net()
        images = jnp.zeros((1, *tiny.IMAGE_SHAPE))
        return str(jax.make_jaxpr(lambda x: model.apply(tiny.variables(model), x, train=False))(images))

    assert "platform" not in jaxpr_of()
    with programs_for(Target(ANY)):
        assert "platform" in jaxpr_of()


def test_the_parameters_are_there_once_and_each_instance_has_its_statistics(found, tmp_path):
    files = stablehlo.write(found, [FULL_RESOLUTION, CHEAP], tmp_path)
    assert files == {
        FULL_RESOLUTION: {"stablehlo": "full.stablehlo", "statistics": "full.npz"},
        CHEAP: {"stablehlo": "p02_r0.75.stablehlo", "statistics": "p02_r0.75.npz"},
    }
    names = {name for of_instance in files.values() for name in of_instance.values()}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "params.npz", "load.py"}
    statistics = nets.read_npz(tmp_path / "p02_r0.75.npz")
    expected = nets.flatten_dict(found.batch_stats[CHEAP], sep="/")
    assert statistics.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(statistics[name], array)
    largest = max(np.size(array) for array in nets.flatten_dict(found.params).values())
    assert all((tmp_path / of["stablehlo"]).stat().st_size < 60_000 for of in files.values()) and largest > 9000


def test_a_program_holds_no_path_of_this_machine(found):
    content = bytes(stablehlo.export_program(found, CHEAP).serialize())
    assert os.fsencode(os.getcwd()) not in content and b".py" not in content
    assert jax.config.jax_traceback_in_locations_limit > 0  # As it was.


def test_a_bfloat16_net_is_exported_with_its_own_precision(monkeypatch):
    nets.register(monkeypatch)
    swept = nets.artefact_of("tiny_preresnet", dtype="bfloat16")
    exported = stablehlo.export_program(swept, CHEAP)
    assert "bf16" in exported.mlir_module()
    images = nets.images_of(swept, 2)
    variables = (nets.flatten_dict(tree, sep="/") for tree in (swept.params, swept.batch_stats[CHEAP]))
    logits = jax.jit(exported.call)(*variables, images)
    assert logits.dtype == np.float32
    assert nets.deviation(logits, nets.logits_of(swept, images, CHEAP)) <= 0.02
