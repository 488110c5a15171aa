"""ONNX models compute what the nets compute, for every family, instance and batch, and share their weights."""

import dataclasses

import numpy as np
import pytest
from interop import families, nets

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.storage import artefact

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from sdpoint_jax.interop import onnx as exported  # noqa: E402
from sdpoint_jax.interop.onnx_graph import build_model  # noqa: E402

CHEAP = SDPointInstance(2, 0.75)


def run(model, images):
    """The logits of a model, which is bytes or lies at a path."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


@pytest.mark.parametrize("name", nets.NETS)
def test_every_instance_of_every_family_gives_the_nets_logits(monkeypatch, tmp_path, name):
    nets.register(monkeypatch)
    swept = nets.artefact_of(name)
    instances = list(swept.batch_stats)
    files = exported.write(swept, instances, tmp_path)
    deviations = {}
    for instance in instances:
        images = nets.images_of(swept, 1 + abs(instance.point))
        found = run(tmp_path / files[instance]["onnx"], images)
        deviations[instance.name] = nets.deviation(found, nets.logits_of(swept, images, instance))
    assert len(deviations) == 7 + 2 * ("stem_r0.50" in deviations)
    assert {name: found for name, found in deviations.items() if not found <= 1e-5} == {}


@pytest.mark.parametrize("kind", families.KINDS)
def test_networks_of_other_families_give_their_own_logits(kind):
    swept = nets.artefact_of(kind)
    images = nets.images_of(swept, 3)
    for instance in (FULL_RESOLUTION, SDPointInstance(1, 0.75)):
        found = run(build_model(swept, instance).SerializeToString(), images)
        assert nets.deviation(found, nets.logits_of(swept, images, instance)) <= 1e-5


def test_a_batch_of_any_size_gives_the_predictors_logits(swept):
    found = artefact.load(swept.folder / "artefact")
    model = build_model(found, CHEAP).SerializeToString()
    for count in (1, 3, 16):
        images = nets.images_of(found, count)
        assert nets.deviation(run(model, images), nets.predicted(found, images, CHEAP)) <= 1e-5


def test_all_models_refer_to_the_same_weights_and_hold_none(swept, tmp_path):
    found = artefact.load(swept.folder / "artefact")
    instances = (FULL_RESOLUTION, CHEAP)
    files = exported.write(found, instances, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"full.onnx", "p02_r0.75.onnx", "params.weights"}
    places = []
    for instance in instances:
        model = onnx.load(tmp_path / files[instance]["onnx"], load_external_data=False)
        outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
        assert not any(tensor.raw_data for tensor in outside)
        places.append({t.name: sorted((entry.key, entry.value) for entry in t.external_data) for t in outside})
    kernels = [array for array in nets.flatten_dict(swept.params).values() if np.ndim(array) > 1]
    assert places[0] == places[1] and len(places[0]) == len(kernels)
    count = sum(map(np.size, kernels))
    assert 4 * count <= (tmp_path / "params.weights").stat().st_size < 4 * count + 64 * len(places[0])


def test_a_bfloat16_net_is_computed_in_float32(monkeypatch):
    nets.register(monkeypatch)
    swept = nets.artefact_of("tiny_wrn", dtype="bfloat16")
    images = nets.images_of(swept, 2)
    found = run(build_model(swept, CHEAP).SerializeToString(), images)
    in_float32 = nets.logits_of(dataclasses.replace(swept, dtype="float32"), images, CHEAP)
    assert nets.deviation(found, in_float32) <= 1e-5 < nets.deviation(nets.logits_of(swept, images, CHEAP), in_float32)
