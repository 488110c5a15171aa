"""A predictor gives what the net gives with the instance's own statistics, within the budget."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from sdpoint_jax.choice.cascade import Cascade, CascadeRow, Measured, confidence
from sdpoint_jax.choice.selection import Budget
from sdpoint_jax.choice.table import Latency
from sdpoint_jax.data.augment.crop import resize_and_center_crop
from sdpoint_jax.evaluation import sweep
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.serving.predictor import Predictor, describe_runtimes
from sdpoint_jax.storage import artefact, checkpoint
from sdpoint_jax.storage.device import describe_device

ROOT = pathlib.Path(__file__).parents[2]
ROWS = (
    tiny.row("full", 100, 0.9),
    tiny.row("p01_r0.50", 30, 0.7),
    tiny.row("p01_r0.75", 60, 0.65),
    tiny.row("p02_r0.50", 60, 0.92),
)


@pytest.fixture(scope="module")
def predictor(swept):
    return Predictor.load(swept.folder / "artefact")


@pytest.fixture(scope="module")
def test_images(swept):
    batch = next(iter(swept.experiment.evaluation_batches("test")))
    return batch["images"], batch["labels"]


def test_the_most_accurate_instance_within_the_budget_is_picked(swept):
    predictor = Predictor(dataclasses.replace(artefact.load(swept.folder / "artefact"), rows=ROWS))
    picked = [predictor.select(max_macs=budget).name for budget in (30, 59, 60, 99, 1000, None)]
    assert picked == ["p01_r0.50", "p01_r0.50", "p02_r0.50", "p02_r0.50", "p02_r0.50", "p02_r0.50"]
    with pytest.raises(ValueError, match="max_macs 29: the cheapest instance, p01_r0.50, needs 30 MACs"):
        predictor.select(max_macs=29)


@pytest.mark.parametrize("name", ["full", "p01_r0.50", "p03_r0.75"])
def test_predictions_are_those_of_the_net_with_the_instances_statistics(swept, predictor, test_images, name):
    found = artefact.load(swept.folder / "artefact")
    images = normalize(jnp.asarray(test_images[0][:13]), (0.305,), (0.376,))
    instance = SDPointInstance.from_name(name)
    variables = {"params": found.params, "batch_stats": found.batch_stats[instance]}
    expected = swept.experiment.model.apply(variables, images, instance=instance, train=False)
    for given in (name, instance):
        np.testing.assert_allclose(
            predictor.predict(test_images[0][:13], instance=given), expected, rtol=1e-4, atol=1e-5
        )


def test_the_predictor_is_as_accurate_as_the_table_says(swept, predictor):
    batches = [b for b in swept.experiment.evaluation_batches("test")]
    images = np.concatenate([b["images"] for b in batches])[:400]
    labels = np.concatenate([b["labels"] for b in batches])[:400]
    for row in predictor.rows:
        top1 = (predictor.predict(images, instance=row.instance).argmax(1) == labels).mean()
        assert top1 == pytest.approx(row.top1, abs=1 / 400)


def test_a_budget_uses_the_instance_that_select_names(predictor, test_images):
    cheapest = min(predictor.rows, key=lambda row: row.macs)
    by_budget = predictor.predict(test_images[0], max_macs=cheapest.macs)
    np.testing.assert_array_equal(by_budget, predictor.predict(test_images[0], instance=cheapest.instance))
    assert predictor.predict(test_images[0][:0]).shape == (0, 10)


def test_an_instance_that_was_not_swept_is_refused(swept, tmp_path):
    sweep.sweep(swept.experiment, swept.params, (FULL_RESOLUTION,), tmp_path, split="test")
    predictor = Predictor.load(tmp_path / "artefact")
    with pytest.raises(ValueError, match="p02_r0.50: its statistics were not re-estimated; the artefact has full"):
        predictor.predict(np.zeros((1, 8, 8, 1), np.uint8), instance="p02_r0.50")


BAD_IMAGES = {
    "another type": (np.zeros((2, 8, 8, 1), np.int32), r"images int32 \[2, 8, 8, 1\]: needs uint8 \[B, 8, 8, 1\]"),
    "another rank": (np.zeros((8, 8, 1), np.uint8), r"images uint8 \[8, 8, 1\]: needs uint8 \[B, 8, 8, 1\]"),
    "another size": (np.zeros((2, 8, 9, 1), np.uint8), r"images uint8 \[2, 8, 9, 1\]: needs"),
    "other channels": (np.zeros((2, 8, 8, 3), np.uint8), r"images uint8 \[2, 8, 8, 3\]: needs"),
    "normalised": (np.full((2, 8, 8, 1), -0.5), "images float64 from -0.5 to -0.5: floats must lie in 0..1"),
    "not a number": (np.full((2, 8, 8, 1), np.nan), "images float64 from nan to nan: floats must lie in 0..1"),
    "no image": (b"no image", r"image 0: cannot be decoded \(not an image\)"),
    "a list with one that is none": ([np.zeros((9, 9, 1), np.uint8), b""], "image 1: empty file"),
    "a list with another type": ([np.zeros((9, 9, 1))], r"image 0, float64 \[9, 9, 1\]: needs a path, bytes, a PIL"),
    "text": (["nowhere.png"], "nowhere.png"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_do_not_fit_are_named(predictor, kind):
    images, message = BAD_IMAGES[kind]
    with pytest.raises((ValueError, OSError), match=message):
        predictor.predict(images)


def test_a_file_that_is_no_image_is_named(predictor, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=f"^{tmp_path}/text.png: cannot be decoded .not an image"):
        predictor.predict([tmp_path / "text.png"])


def test_all_kinds_of_images_give_the_same(predictor, test_images, tmp_path):
    image = test_images[0][0]
    large = Image.fromarray(np.kron(image[..., 0], np.ones((3, 3), np.uint8)))  # 24 x 24, to be resized.
    large.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    resized = resize_and_center_crop(np.asarray(large)[..., None], (8, 8), (8, 8))[None]
    expected = predictor.predict(resized, instance="full")
    for given in (tmp_path / "image.png", str(tmp_path / "image.png"), content, large, [np.asarray(large)[..., None]]):
        np.testing.assert_array_equal(predictor.predict(given, instance="full"), expected)
    np.testing.assert_array_equal(predictor.predict(resized / 255, instance="full"), expected)
    several = predictor.predict([large, content], instance="full")
    np.testing.assert_allclose(several, np.concatenate([expected, expected]), rtol=1e-5, atol=1e-6)


def test_classes_are_the_most_probable_ones(predictor, test_images):
    images = test_images[0][:5]
    probabilities = predictor.predict_probabilities(images, instance="full")
    logits = predictor.predict(images, instance="full")
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-5)
    for row, found in zip(probabilities, predictor.predict_classes(images, top=3, instance="full"), strict=True):
        assert [prediction.label for prediction in found] == np.argsort(-row)[:3].tolist()
        assert [prediction.class_name for prediction in found] == [str(label) for label in np.argsort(-row)[:3]]
        assert [prediction.probability for prediction in found] == pytest.approx(sorted(row, reverse=True)[:3])
    for top in (0, 11):
        with pytest.raises(ValueError, match=f"top {top}: valid are 1 to 10"):
            predictor.predict_classes(images, top=top)


def test_a_budget_and_an_instance_are_not_given_together(predictor, test_images):
    with pytest.raises(ValueError, match="max_macs 100 and instance full: give one of them"):
        predictor.predict(test_images[0][:1], max_macs=100, instance="full")
    with pytest.raises(ValueError, match="max_macs 1 and budget .*: give one of them"):
        predictor.select(Budget(min_top1=0.5), max_macs=1)


def test_a_cascade_answers_with_the_logits_of_the_stage_that_stops(swept, test_images):
    stages = (SDPointInstance(1, 0.5), FULL_RESOLUTION)
    images = test_images[0][:40]
    predictor = Predictor.load(swept.folder / "artefact")
    cheap, full = (predictor.predict(images, instance=stage) for stage in stages)
    sure = confidence(cheap, "max_probability")
    cascade = Cascade(stages, (float(np.median(sure)),))
    logits, reached = predictor.run_cascade(images, cascade)
    assert (reached == (sure < np.median(sure))).all() and 0 < reached.sum() < 40
    np.testing.assert_allclose(logits, np.where(reached[:, None] == 0, cheap, full), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predictor.predict(images, cascade=cascade), logits)
    with pytest.raises(ValueError, match="cascade 'p01_r0.50.full': the artefact has none; evaluate.py --cascades"):
        predictor.predict(images, cascade="p01_r0.50+full")
    with pytest.raises(ValueError, match="no cascades"):
        predictor.predict(images, mean_macs=1e6)
    with pytest.raises(ValueError, match="instance full and cascade x: give one of them"):
        predictor.predict(images, instance="full", cascade="x")


def test_several_devices_share_the_work(swept, test_images):
    several = Predictor.load(swept.folder / "artefact", devices=jax.local_devices()[:2])
    several.compile(["full"], [4])
    one = Predictor.load(swept.folder / "artefact")
    images = test_images[0][:11]
    expected = one.predict(images, instance="full")
    np.testing.assert_allclose(several.predict(images, instance="full"), expected, rtol=1e-5, atol=1e-6)
    used = {
        device
        for replica in several._replicas
        for leaf in jax.tree.leaves(replica._params)
        for device in leaf.devices()
    }
    assert used == set(jax.local_devices()[:2])


def test_predicting_makes_no_program_and_no_copy_of_the_parameters(swept, test_images):
    predictor = Predictor.load(swept.folder / "artefact")
    names = [row.name for row in swept.rows]
    predictor.compile(names, [8])
    images = test_images[0][:8]
    predictor.predict(images, instance="full")
    traced, before = [], len(jax.live_arrays())
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: traced.append(event))
    for name in names * 3:
        predictor.predict(images, instance=name)
    assert not [event for event in traced if "compile" in event]
    assert len(jax.live_arrays()) <= before


def test_a_checkpoint_of_a_run_is_no_artefact(swept, tmp_path):
    checkpoint.save(tmp_path / "run", {"params": swept.params}, {"config": {}})
    with pytest.raises(checkpoint.CheckpointError, match="not the artefact of a sweep"):
        Predictor.load(tmp_path / "run")


def test_the_command_picks(swept, capsys):
    path = swept.folder / "artefact"
    commands.run("select", path, "--relative-budget=0.99")
    assert "budget of" in capsys.readouterr().out
    assert commands.error_of(capsys, "select", path, "--max-macs=1").startswith("error: max_macs 1.0: the cheapest")


def test_after_compile_nothing_else_is_compiled(swept, test_images):
    predictor, images = Predictor.load(swept.folder / "artefact"), test_images[0]
    expected = predictor.predict(images[:21], instance="p01_r0.50")
    strict = Predictor.load(swept.folder / "artefact")
    strict.compile(["p01_r0.50", FULL_RESOLUTION], [8, 3])
    before = set(strict.programs)
    assert {(instance.name, size) for instance, size in before} == {
        (name, size) for name in ("full", "p01_r0.50") for size in (3, 8)
    }
    for count in (1, 3, 4, 8, 9, 21):
        found = strict.predict(images[:count], instance="p01_r0.50")
        np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-5)
    assert set(strict.programs) == before
    with pytest.raises(ValueError, match="instance p02_r0.50: not compiled; compiled are p01_r0.50, full"):
        strict.predict(images[:1], instance="p02_r0.50")
    with pytest.raises(ValueError, match=r"batch_sizes \[0, 2\]: give at least one, each at least 1"):
        strict.compile(["full"], [2, 0])


def test_after_compile_a_budget_chooses_among_what_is_compiled(swept, test_images):
    predictor = Predictor(dataclasses.replace(artefact.load(swept.folder / "artefact"), rows=ROWS))
    images, budget = test_images[0][:3], Budget(max_macs=60)
    assert predictor.select(budget).name == "p02_r0.50"
    predictor.compile(["p01_r0.75", "full"], [4])
    assert predictor.select(budget).name == "p01_r0.75"
    expected = predictor.predict(images, instance="p01_r0.75")
    np.testing.assert_array_equal(predictor.predict(images, budget=budget), expected)
    with pytest.raises(ValueError, match=r"max_macs 30: the cheapest .* p01_r0.75, .*\(compiled are full, p01_r0.75\)"):
        predictor.predict(images, max_macs=30)
    predictor.compile(["p01_r0.50"], [4])  # It is a candidate for budgets that were asked before, too.
    assert predictor.select(budget).name == "p01_r0.50"
    assert predictor.predict(images, max_macs=30).shape == (3, 10)


def _cascade_row(first, mean_macs, top1):
    measured = Measured(mean_macs, top1, 20, (0.5, 0.5))
    stages = (SDPointInstance.from_name(first), FULL_RESOLUTION)
    return CascadeRow(Cascade(stages, (0.5,)), (30, 70), "validation", measured, measured)


def test_after_compile_a_mean_cost_chooses_among_the_compiled_cascades(swept, test_images):
    found = artefact.load(swept.folder / "artefact")
    rows = [_cascade_row("p01_r0.50", 60.0, 0.7), _cascade_row("p02_r0.50", 90.0, 0.8)]
    predictor = Predictor(dataclasses.replace(found, cascades=tuple(row.to_record() for row in rows)))
    assert predictor.find_cascade(100.0).name == "p02_r0.50+full"
    predictor.compile([], [4], cascades=["p01_r0.50+full"])
    assert predictor.find_cascade(100.0).name == "p01_r0.50+full"
    assert predictor.predict(test_images[0][:2], mean_macs=100.0).shape == (2, 10)
    with pytest.raises(ValueError, match="cascade p02_r0.50.full: not compiled; compiled are p01_r0.50.full"):
        predictor.predict(test_images[0][:2], cascade="p02_r0.50+full")
    with pytest.raises(ValueError, match="no instance was compiled, only cascades"):
        predictor.predict(test_images[0][:2], max_macs=1e9)


def test_what_a_notebook_shows_fits_three_lines(swept):
    found = dataclasses.replace(artefact.load(swept.folder / "artefact"), rows=ROWS)
    net = """wrn10_1: 10 classes, images 8x8x1, float32
  4 instances: p01_r0.50 (30 MACs, top-1 70.00 %) to full (100 MACs, top-1 90.00 %)"""
    assert repr(found) == f"<Artefact of {net}\n  not profiled on any device>"
    row = _with_latencies(ROWS[0], "cpu: other")
    assert repr(found.with_rows([row])).endswith(
        "  1 instance: full (100 MACs, top-1 90.00 %)\n  profiled on cpu: other>"
    )
    predictor = Predictor(found, runtime="xla")
    assert repr(predictor) == f"<Predictor of {net}\n  on {describe_device()}, in xla>"
    predictor._compiled = {row.instance: (1,)}
    assert "top-1 90.00 %); compiled: 1 of them\n" in repr(predictor)


def test_threads_get_the_answers_to_their_own_images(predictor, test_images):
    images, names = test_images[0], [row.name for row in predictor.rows]
    expected = {name: predictor.predict(images[:64], instance=name) for name in names}
    wrong = []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for _ in range(12):
            name, start, count = names[rng.integers(len(names))], rng.integers(48), rng.integers(1, 16)
            found = predictor.predict(images[start : start + count], instance=name)
            if not np.allclose(found, expected[name][start : start + count], rtol=1e-4, atol=1e-5):
                wrong.append((name, start, count))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


SECOND_START = """
import json, sys, jax, numpy as np
lowered = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: lowered.append(event) if event.startswith("/jax/core/compile/jaxpr_to_mlir") else None
)
from sdpoint_jax import Predictor
from sdpoint_jax.programs.devices import compiler_options
predictor = Predictor.load(sys.argv[1], devices=jax.local_devices())
compiler_options()  # Asks XLA which options it knows.
before = len(lowered)
predictor.compile(["full", "p01_r0.50"], [1, 4])
logits = predictor.predict(np.zeros((3, 8, 8, 1), np.uint8), instance="full")
print(json.dumps([len(lowered) - before, float(logits.sum())]))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_start_compiles_nothing(swept, tmp_path, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SECOND_START, str(swept.folder / "artefact")]
    runs = [
        json.loads(
            subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
        for _ in range(2)
    ]
    assert runs[0][0] >= 4 and runs[1][0] == 0
    assert runs[0][1] == runs[1][1]


def test_an_artefact_is_read_as_it_was_written(swept, tmp_path):
    found = artefact.load(swept.folder / "artefact")
    assert found.rows == swept.rows and set(found.batch_stats) == {row.instance for row in swept.rows}
    jax.tree.map(np.testing.assert_array_equal, found.params, swept.params)
    artefact.save(found, tmp_path / "again")
    again = artefact.load(tmp_path / "again")
    assert dataclasses.replace(again, params=None, batch_stats={}) == dataclasses.replace(
        found, params=None, batch_stats={}
    )


def test_an_artefact_of_the_first_format_is_read_and_one_of_a_later_is_refused(swept, tmp_path):
    arrays, record = checkpoint.load(swept.folder / "artefact")
    old = {key: value for key, value in record.items() if key not in ("format", "resize")}
    checkpoint.save(tmp_path / "old", arrays, old)
    assert artefact.load(tmp_path / "old").rows == swept.rows
    checkpoint.save(tmp_path / "new", arrays, record | {"format": 99})
    with pytest.raises(checkpoint.CheckpointError, match="new: an artefact of format 99; .* reads 1 to 2: update"):
        Predictor.load(tmp_path / "new")
    checkpoint.save(tmp_path / "odd", arrays, record | {"table": [{"instance": "full"}]})
    with pytest.raises(checkpoint.CheckpointError, match="odd: not a sound artefact: not a row"):
        Predictor.load(tmp_path / "odd")


MEASURED = {"full": {1: (2.0, 1.0), 8: (4.0, 6.0)}, "p01_r0.50": {1: (2.0, 3.0), 8: (4.0, 3.0)}}  # XLA, onnxruntime.


@pytest.fixture
def profiled(swept):
    """The artefact with made-up latencies of two instances in both runtimes, on the device at hand."""
    found = artefact.load(swept.folder / "artefact")
    return found.with_rows([_with_latencies(row, describe_device()) for row in found.rows])


def _with_latencies(row, device):
    for size, values in MEASURED.get(row.name, {}).items():
        for runtime, ms in zip(("xla", "onnxruntime"), values):
            row = row.with_latency(Latency(device, runtime, "float32", size, ms, ms, 9, None, None, {}))
    return row


@pytest.fixture
def with_onnxruntime():
    pytest.importorskip("onnxruntime")


def test_the_faster_runtime_is_used_for_each_instance_and_batch_size(profiled, test_images, with_onnxruntime):
    predictor, images = Predictor(profiled), test_images[0]
    sizes = (1, 3, 8, 9)
    assert predictor.runtimes == ("xla", "onnxruntime")
    assert [predictor.runtime_of("full", size) for size in sizes] == ["onnxruntime", "xla", "xla", "xla"]
    assert [predictor.runtime_of("p01_r0.50", size) for size in sizes] == ["xla", *["onnxruntime"] * 3]
    assert predictor.runtime_of("p02_r0.50", 1) == "xla"  # Not measured.
    assert describe_runtimes(predictor, ["full", "p01_r0.50"], [8, 1, 9]) == (
        "onnxruntime at batch size 1 (1 of 2 instances), 8 (1 of 2 instances), 9 (1 of 2 instances); "
        "xla at batch size 1 (1 of 2 instances), 8 (1 of 2 instances), 9 (1 of 2 instances)"
    )
    reference = Predictor(profiled, runtime="xla")
    assert describe_runtimes(reference, ["full", "p01_r0.50"], [8, 1]) == "xla at batch size 1, 8"
    for name, count in (("full", 1), ("full", 8), ("p01_r0.50", 1), ("p01_r0.50", 5)):
        expected = reference.predict(images[:count], instance=name)
        np.testing.assert_allclose(predictor.predict(images[:count], instance=name), expected, rtol=1e-4, atol=1e-5)
    assert {instance.name for instance in predictor.sessions} == {"full", "p01_r0.50"}
    assert {(instance.name, size) for instance, size in predictor.programs} == {("full", 8), ("p01_r0.50", 1)}
    assert not len(reference.sessions)


def test_onnxruntime_alone_compiles_nothing_and_pads_nothing(profiled, test_images, with_onnxruntime):
    predictor, images = Predictor(profiled, runtime="onnxruntime"), test_images[0]
    predictor.compile(["full", "p02_r0.50"], [4])
    assert len(predictor.sessions) == 2
    seen, session = [], predictor.sessions._programs[FULL_RESOLUTION]
    predictor.sessions._programs[FULL_RESOLUTION] = lambda images: seen.append(len(images)) or session(images)
    found = predictor.predict(images[:11], instance="full")
    np.testing.assert_allclose(
        found, Predictor(profiled, runtime="xla").predict(images[:11], instance="full"), atol=1e-4
    )
    assert seen == [4, 4, 3]
    assert len(predictor.sessions) == 2 and not len(predictor.programs)
    program = predictor.program("full", 4)
    np.testing.assert_allclose(program(jnp.asarray(images[:4])), found[:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="instance p01_r0.50: not compiled"):
        predictor.predict(images[:1], instance="p01_r0.50")


def test_threads_get_their_own_answers_from_two_runtimes(profiled, test_images, with_onnxruntime):
    test_threads_get_the_answers_to_their_own_images(Predictor(profiled), test_images)


def test_where_onnxruntime_does_not_do_xla_runs_everything(profiled, monkeypatch):
    bfloat16 = dataclasses.replace(profiled, dtype="bfloat16")
    assert Predictor(bfloat16).runtimes == ("xla",)
    assert Predictor(profiled, devices=jax.local_devices()[:2]).runtimes == ("xla",)
    with pytest.raises(ValueError, match="runtime 'tvm': valid are auto, xla, onnxruntime"):
        Predictor(profiled, runtime="tvm")
    find = importlib.util.find_spec
    found = {"onnxruntime": None, "onnx": find("numpy")}  # As if onnx were there, and onnxruntime not.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find(name))
    predictor = Predictor(profiled)
    assert predictor.runtime_of("full", 1) == "xla"
    assert predictor.select(Budget(max_latency_ms=2.0)).name in MEASURED
    with pytest.raises(ValueError, match="max_latency_ms 1.5: the fastest instance"):
        predictor.select(Budget(max_latency_ms=1.5))
    with pytest.raises(ImportError, match=r"needs onnxruntime, pip install 'sdpoint_jax\[onnx\]'"):
        Predictor(profiled, runtime="onnxruntime")


def test_selection_by_latency_counts_the_runtime_that_runs(profiled, with_onnxruntime):
    budget = Budget(max_latency_ms=1.5)
    assert Predictor(profiled).select(budget).name == "full"
    assert Predictor(profiled, runtime="onnxruntime").select(budget).name == "full"
    with pytest.raises(ValueError, match="max_latency_ms 1.5: the fastest instance, .* takes 2.0 ms .*xla"):
        Predictor(profiled, runtime="xla").select(budget)


def test_selection_by_latency_of_another_device_is_a_warning_that_names_both(swept):
    found = artefact.load(swept.folder / "artefact")
    predictor = Predictor(found.with_rows([_with_latencies(row, "cpu: other") for row in found.rows]), runtime="xla")
    with pytest.warns(UserWarning, match=f"measured on 'cpu: other' is used on '{predictor.device}'"):
        predictor.select(Budget(max_latency_ms=2.0))
    assert predictor.select(Budget(max_macs=10**9)).name  # Without a warning.
