"""Single instances under torchvision's names: what was exported is imported again, and PyTorch computes the same."""

import dataclasses
import json

import numpy as np
import pytest
import torch_formulation as formulation
from interop import nets

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.interop.inference_trace import norms_after_convolutions, trace_inference
from sdpoint_jax.interop.torch_import import import_torch_state_dict, torch_tensors
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import NORM_EPSILON

load_file = pytest.importorskip("safetensors.numpy").load_file

from sdpoint_jax.interop import safetensors as exported  # noqa: E402

CHEAP = SDPointInstance(2, 0.75)
TORCHVISIONS = ("tiny_resnet", "tiny_resnext", "tiny_preresnet")  # Their shortcuts are those of torchvision's nets.


@pytest.fixture(autouse=True)
def table(monkeypatch):
    nets.register(monkeypatch)


def imported(swept, tensors):
    return import_torch_state_dict(tensors, create_model(swept.model, swept.num_classes), channels=3)


@pytest.mark.parametrize("name", nets.NETS)
def test_importing_what_was_exported_gives_the_variables(tmp_path, name):
    swept = nets.artefact_of(name)
    files = exported.write(swept, [FULL_RESOLUTION, CHEAP], tmp_path)
    assert files[CHEAP] == {"safetensors": "p02_r0.75/model.safetensors", "config": "p02_r0.75/config.json"}
    variables = imported(swept, load_file(tmp_path / files[CHEAP]["safetensors"]))
    expected = {"params": swept.params, "batch_stats": swept.batch_stats[CHEAP]}
    for path, array in nets.flatten_dict(expected, sep="/").items():
        np.testing.assert_array_equal(nets.flatten_dict(variables, sep="/")[path], array)


def unfolded(swept, folded):
    """The tensors of a net whose convolutions have biases, as those of one whose BatchNorms add them."""
    wanted = torch_tensors(create_model(swept.model, swept.num_classes))
    names = {"/".join(tensor.path[1:-1]): name.rpartition(".")[0] for name, tensor in wanted.items()}
    tensors = {name: array for name, array in folded.items() if name in wanted}
    for convolution, norm in norms_after_convolutions(trace_inference(swept, CHEAP)).items():
        bias = folded[f"{names[convolution]}.bias"]
        ones, zeros = np.ones_like(bias), np.zeros_like(bias)
        leaves = {"weight": ones, "bias": bias, "running_mean": zeros, "running_var": ones - NORM_EPSILON}
        tensors |= {f"{names[norm.norm]}.{leaf}": np.float32(array) for leaf, array in leaves.items()}
    return tensors


@pytest.mark.parametrize("name, kept", [("tiny_resnext", 0), ("tiny_resnet_projection", 0), ("tiny_preresnet", 4)])
def test_folded_tensors_compute_the_same(name, kept):
    swept = nets.artefact_of(name)
    folded = exported.state_dict(swept, CHEAP, fold=True)
    assert len([tensor for tensor in folded if tensor.endswith("running_var")]) == kept
    images = nets.images_of(swept, 2)
    variables = imported(swept, unfolded(swept, folded))
    again = dataclasses.replace(swept, params=variables["params"], batch_stats={CHEAP: variables["batch_stats"]})
    assert nets.deviation(nets.logits_of(again, images, CHEAP), nets.logits_of(swept, images, CHEAP)) <= 1e-5


def test_the_config_is_the_one_that_timm_reads(tmp_path):
    swept = nets.artefact_of("tiny_resnet", resize=(55, 40), channels=1)
    exported.write(swept, [FULL_RESOLUTION, SDPointInstance(STEM, 0.5), CHEAP], tmp_path)
    configs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/config.json"))]
    full, cheap, stem = configs
    crop = full["pretrained_cfg"].pop("crop_pct")
    assert int(48 / crop) == 55
    assert full == {
        "architecture": "tiny_resnet",
        "num_classes": 5,
        "label_names": ["a", "b", "c", "d", "e"],
        "model_args": {"in_chans": 1},
        "pretrained_cfg": {
            "input_size": [1, 48, 32],
            "interpolation": "bilinear",
            "crop_mode": "center",
            "mean": [0.4],
            "std": [0.2],
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "sdpoint": {"instance": "full", "point": 0, "ratio": 1.0, "pool": None, "folded": False},
    }
    assert cheap["sdpoint"]["pool"]["after"] == "the addition of layer1.1, before its ReLU"
    assert stem["sdpoint"]["pool"]["function"] == "adaptive_max_pool2d"


def test_a_resnext_has_torchvisions_name():
    assert exported._torchvision_name("resnext50") == "resnext50_32x4d"
    assert exported._torchvision_name("resnet50") == "resnet50"


@pytest.mark.parametrize("instance", ["full", "stem_r0.75", "p02_r0.50"])
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_pytorch_gives_the_same_logits(tmp_path, name, instance):
    torch = pytest.importorskip("torch")
    instance, swept = SDPointInstance.from_name(instance), nets.artefact_of(name)
    files = exported.write(swept, [instance], tmp_path)
    arrays = load_file(tmp_path / files[instance]["safetensors"])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    images = nets.images_of(swept, 3)
    inputs = torch.from_numpy(np.array(normalize(images, swept.mean, swept.std)).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = formulation.torch_logits(tensors, inputs, instance.point, instance.ratio)
    assert nets.deviation(found.numpy(), nets.logits_of(swept, images, instance)) <= 1e-5
