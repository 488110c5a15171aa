"""Wherever an instance with scales and shifts of its own runs, it computes with these, and full resolution does not."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from interop import nets

from sdpoint_jax.choice.cascade import Cascade, confidence
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.interop import bundle
from sdpoint_jax.interop.torch_import import import_torch_state_dict
from sdpoint_jax.models.norm_parameters import with_own_norms
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage import artefact

FIRST, SECOND = SDPointInstance(1, 0.5), SDPointInstance(2, 0.75)
INSTANCES = (FULL_RESOLUTION, FIRST, SECOND)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    nets.register(monkeypatch)


@pytest.fixture
def found(table, tmp_path):
    """An artefact, read from disk, in which instances differ in scales and shifts after their points."""
    swept = nets.artefact_of("tiny_wrn")
    model, rng = create_model(swept.model, swept.num_classes), np.random.default_rng(1)
    params = with_own_norms(model, swept.params, INSTANCES)
    own = jax.tree.map(lambda x: x * rng.uniform(0.5, 1, x.shape).astype(np.float32), params["per_instance"])
    artefact.save(dataclasses.replace(swept, params=params | {"per_instance": own}), tmp_path / "artefact")
    return artefact.load(tmp_path / "artefact")


def ordinary(swept, instance):
    """The artefact of a net that has the instance's scales and shifts as its only ones."""
    params = flatten_dict({name: tree for name, tree in swept.params.items() if name != "per_instance"})
    own = flatten_dict(swept.params["per_instance"].get(instance.name, {}))
    assert own.keys() < params.keys() and bool(own) == (instance != FULL_RESOLUTION)
    return dataclasses.replace(swept, params=unflatten_dict(params | own))


def expected(swept, images, instance):
    return nets.logits_of(ordinary(swept, instance), images, instance)


def test_a_predictor(found):
    images = nets.images_of(found, 5)
    predictor = Predictor(found)
    logits = {instance: predictor.predict(images, instance=instance) for instance in INSTANCES}
    for instance in INSTANCES:
        assert nets.deviation(logits[instance], expected(found, images, instance)) <= 1e-5
    shared = dataclasses.replace(found, params=ordinary(found, FULL_RESOLUTION).params)
    assert nets.deviation(logits[FIRST], nets.logits_of(shared, images, FIRST)) > 0.01


def test_a_cascade_whose_stages_share_their_prefix(found):
    one = flatten_dict(found.batch_stats[FULL_RESOLUTION])  # Of one re-estimation: the same before every point.
    found = dataclasses.replace(found, batch_stats=dict.fromkeys(found.batch_stats, unflatten_dict(one)))
    images = nets.images_of(found, 6)
    by_stage = [expected(found, images, stage) for stage in (FIRST, SECOND, FULL_RESOLUTION)]
    medians = [float(np.median(confidence(np.asarray(logits), "max_probability"))) for logits in by_stage[:2]]
    logits, stages = Predictor(found).run_cascade(images, Cascade((FIRST, SECOND, FULL_RESOLUTION), medians))
    assert len(set(stages)) > 1
    assert nets.deviation(logits, np.choose(np.array(stages)[:, None], by_stage)) <= 1e-5


def load_classifier(folder):
    spec = importlib.util.spec_from_file_location("exported_load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Classifier(folder)


def test_a_program_in_stablehlo(found, tmp_path):
    pytest.importorskip("flatbuffers")
    manifest = bundle.write(found, INSTANCES, tmp_path / "exported")
    files = {row["instance"]: row["files"] for row in manifest["instances"]}
    assert files["p01_r0.50"]["params"] == "p01_r0.50.params.npz" and "params" not in files["full"]
    assert not any(name.startswith("per_instance") for name in nets.read_npz(tmp_path / "exported" / "params.npz"))
    classifier, images = load_classifier(tmp_path / "exported"), nets.images_of(found, 3)
    for instance in INSTANCES:
        logits = classifier.classify(images, instance.name)
        assert nets.deviation(logits, expected(found, images, instance)) <= 1e-5


def test_an_onnx_model(found, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle.write(found, INSTANCES, tmp_path / "exported", formats=["onnx"])
    images = nets.images_of(found, 3)
    for instance in INSTANCES:
        path = tmp_path / "exported" / f"{instance.name}.onnx"
        logits = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]
        assert nets.deviation(logits, expected(found, images, instance)) <= 1e-5
    shared = sum(np.size(array) for array in jax.tree.leaves(ordinary(found, FULL_RESOLUTION).params))
    assert (tmp_path / "exported" / "params.weights").stat().st_size < 4 * shared + 64 * 100


def test_tensors_under_torchvisions_names(found):
    exported = pytest.importorskip("sdpoint_jax.interop.safetensors")
    for instance in INSTANCES:
        tensors = exported.state_dict(found, instance)
        variables = import_torch_state_dict(tensors, create_model(found.model, found.num_classes), channels=3)
        jax.tree.map(np.testing.assert_array_equal, variables["params"], ordinary(found, instance).params)


def test_statistics_and_metrics(found):
    model = create_model(found.model, found.num_classes)
    settings = dict(image_shape=found.image_shape, batch_size=8, preprocess=lambda x: x.astype(np.float32) / 255)
    batch = {"images": nets.images_of(found, 8), "labels": np.arange(8, dtype=np.int32) % 5, "mask": np.ones(8, "f4")}
    evaluator = Evaluator(model, INSTANCES, **settings)
    statistics = evaluator.reestimate(found.params, [batch])
    metrics = evaluator.evaluate(found.params, statistics, [batch])
    for instance in INSTANCES:
        alone = ordinary(found, instance).params
        of_alone = evaluator.reestimate(alone, [batch])
        jax.tree.map(np.testing.assert_array_equal, statistics[instance], of_alone[instance])
        assert metrics[instance] == evaluator.evaluate(alone, of_alone, [batch])[instance]
