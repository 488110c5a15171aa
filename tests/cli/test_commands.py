"""Bad input to any command ends it with one line that names the value and what is valid, and an exit code."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import tiny

from sdpoint_jax.cli import main
from sdpoint_jax.config import to_dict
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
TRAIN, EVALUATE = "train.py", "evaluate.py"
COST, SELECT = "cost", "select"
IMPORT, PREPARE = "import", "prepare"
RECORD = {"config": None, "step": 3, "validation": None, "validated_at": 0, "skipped": 0}
SIZE = "--config.dataset.image_size=8,8"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def write_workdirs(folder):
    """The workdirs, checkpoints and other files that the cases below name."""
    config = tiny.config()
    params = tiny.variables(tiny.net())["params"]
    arrays, record = {"params": params}, RECORD | {"config": to_dict(config)}
    checkpoint.save(folder / "sound/checkpoints/3", arrays, record)
    checkpoint.save(folder / "imported", tiny.variables(tiny.net()), {"note": "imported"})
    three = tiny.variables(create_model("wrn10_1", 3))
    checkpoint.save(folder / "three_classes", three, {"model": {"name": "wrn10_1"}, "format": 2})
    checkpoint.save(folder / "newer", arrays, record | {"config": {"format": 3}})
    checkpoint.save(folder / "no_params", {"weights": np.zeros(2)}, record)
    checkpoint.save(folder / "no_config", arrays, {"note": "imported"})
    checkpoint.save(folder / "odd_config", arrays, record | {"config": ["!!python/object/apply:os.system ['x']"]})
    checkpoint.save(folder / "alien", arrays, record | {"config": {"learning_rat": 1}})
    checkpoint.save(folder / "typed", arrays, record | {"config": {"num_epochs": "ten"}})
    checkpoint.save(folder / "model", arrays, record | {"config": {"model": {"name": "../../resnet"}}})
    for name in ("truncated", "altered", "missing"):
        shutil.copytree(folder / "sound", folder / name)
        file = folder / name / "checkpoints/3/record/metadata"
        content = file.read_bytes()
        damaged = {"truncated": content[:9], "altered": content.replace(b"step", b"stop", 1), "missing": None}[name]
        file.unlink() if damaged is None else file.write_bytes(damaged)
    (folder / "empty").mkdir()
    (folder / "unsaved/checkpoints").mkdir(parents=True)
    (folder / "hollow/checkpoints/7").mkdir(parents=True)
    write(folder / "file", "no folder")
    write(folder / "other_log/metrics.jsonl", '{"step": 0}\nnonsense\n')
    write(folder / "bad_table/sweep/sweep.json", '{"instances": [')
    write(folder / "config.py", "def get_config():\n    return 1 / 0\n")
    write(folder / "no_get_config.py", "x = 1\n")
    write(folder / "syntax.py", "def get_config(:\n")
    write(folder / "weights.pth", b"no pickle")
    write(folder / "weights.safetensors", b"no safetensors")
    write(folder / "weights.onnx", b"?")
    safetensors.numpy.save_file({"linear.bias": np.zeros(3, np.float32)}, folder / "named.safetensors")
    write(folder / "images/train/a/1.png", b"no image")
    (folder / "no_images").mkdir()
    checkpoint.save(folder / "escape", arrays, record)
    files = json.loads((folder / "escape/files.json").read_text())
    write(folder / "escape/files.json", json.dumps(files | {"../file": [9, 0]}))


# Command, arguments ({} is a folder with what is written above), and what the message must contain.
CASES = [
    (TRAIN, ["--confg=x"], "Unknown command line flag 'confg'; nearest: --config$"),
    (TRAIN, ["stray"], "argument 'stray': flags begin with --"),
    (
        TRAIN,
        ["--config=configs/nothing.py"],
        r"--config=configs/nothing.py: no such file or config; shipped are .*digits",
    ),
    (TRAIN, ["--config={}/config.py"], "division by zero"),
    (TRAIN, ["--config={}/no_get_config.py"], "get_config"),
    (TRAIN, ["--config={}/syntax.py"], "syntax.py"),
    (TRAIN, ["--config=configs/cifar.py:svhn,wrn28_10"], "configs/cifar.py:svhn,wrn28_10: give cifar10 or cifar100"),
    (TRAIN, ["--config.learning_rat=1"], "config key 'learning_rat': nearest are learning_rate;"),
    (TRAIN, ["--config.model.depth=3"], "config key 'model.depth': nearest are .*model.*;"),
    (TRAIN, ["--config.num_epochs=ten"], "config.num_epochs ten: must be a number"),
    (TRAIN, ["--config.batch_size=1.5"], "config.batch_size 1.5: must be a whole number"),
    (TRAIN, ["--config.seed"], "--config.seed: give a value, as --config.seed=0"),
    (TRAIN, ["--config"], "--config: give a config by its name"),
    (TRAIN, ["--config=folder"], "folder: give the folder of the images after the colon"),
    (TRAIN, ["--config.num_epochs=0"], "config.num_epochs 0.0: must be positive"),
    (TRAIN, ["--config.num_epochs=-1"], "config.num_epochs -1.0: must be positive"),
    (TRAIN, ["--config.num_epochs=inf"], "config.num_epochs inf: must be finite"),
    (TRAIN, ["--config.learning_rate=nan"], "config.learning_rate nan: must be positive"),
    (TRAIN, ["--config.batch_size=0"], "config.batch_size 0: at least 1"),
    (
        TRAIN,
        ["--config.batch_size=63", "--config.microbatches=2"],
        "config.microbatches 2: does not divide a device's 63 images",
    ),
    (TRAIN, ["--config.batch_size=100000"], "config.batch_size 100000: more than the 1197 training images"),
    (TRAIN, ["--config.microbatches=0"], "config.microbatches 0: at least 1"),
    (TRAIN, ["--config.momentum=-0.1"], "config.momentum -0.1: at least 0"),
    (TRAIN, ["--config.clip_norm=nan"], "config.clip_norm nan: at least 0"),
    (TRAIN, ["--config.checkpoint_every_steps=0"], "config.checkpoint_every_steps 0: at least 1"),
    (TRAIN, ["--config.checkpoint_every_minutes=-1"], "config.checkpoint_every_minutes -1.0: at least 0"),
    (TRAIN, ["--config.keep_checkpoints=0"], "config.keep_checkpoints 0: at least 1"),
    (
        TRAIN,
        ["--config.keep_best_checkpoints=1", "--config.best_metric=half/top1"],
        "config.best_metric 'half/top1': valid are full, .*, each with /top1 or /loss",
    ),
    (TRAIN, ["--config.on_log_error=ignore"], "config.on_log_error 'ignore': valid are error, continue"),
    (TRAIN, ["--config.on_nonfinite=stop"], "config.on_nonfinite 'stop': valid are error, skip"),
    (TRAIN, ["--config.schedule=linear"], "config.schedule 'linear': valid are cosine, step"),
    (TRAIN, ["--config.sampling=random"], "sampling 'random': valid are uniform, legacy, weighted, cost"),
    (TRAIN, ["--config.label_smoothing=1"], "config.label_smoothing 1.0: at least 0, less than 1"),
    (
        TRAIN,
        ["--config.instances_per_step=3", "--config.instances=full"],
        "config.instances_per_step 3: more than the 1 instances of the run, full",
    ),
    (TRAIN, ["--config.instances_per_step=0"], "config.instances_per_step 0: at least 1"),
    (TRAIN, ["--config.step_instances=all"], "config.step_instances 'all': valid are sandwich, full, drawn"),
    (
        TRAIN,
        ["--config.instances_per_step=2", "--config.instances=p01_r0.50,p02_r0.50"],
        "config.step_instances 'sandwich': trains full resolution in every step, which is not among",
    ),
    (
        TRAIN,
        ["--config.instances_per_step=2", "--config.sampling=legacy"],
        "config.instances_per_step 2: legacy sampling draws one instance a step",
    ),
    (
        TRAIN,
        ["--config.distillation=0.5"],
        "config.distillation 0.5: needs config.teacher, or full resolution in every",
    ),
    (
        TRAIN,
        ["--config.distillation=0.5", "--config.distillation_targets=mean"],
        "config.distillation_targets 'mean': needs config.instances_per_step of at least 2",
    ),
    (
        TRAIN,
        ["--config.distillation=0.5", "--config.distillation_targets=mean", "--config.teacher={}/sound"],
        "config.distillation_targets 'mean': with config.teacher .*sound, its targets are used",
    ),
    (TRAIN, ["--config.distillation_start=1"], "config.distillation_start 1.0: at least 0, less than 1"),
    (TRAIN, ["--config.distillation=1.5"], "config.distillation 1.5: a share of the loss"),
    (TRAIN, ["--config.distillation_temperature=0"], "config.distillation_temperature 0.0: must be positive"),
    (TRAIN, ["--config.teacher={}/sound"], "config.teacher .*sound: with config.distillation 0.0 it teaches nothing"),
    (TRAIN, ["--config.teacher={}/nowhere", "--config.distillation=0.5"], "nowhere: no such checkpoint"),
    (
        TRAIN,
        ["--config.teacher={}/three_classes", "--config.distillation=0.5"],
        "config.teacher .*three_classes: a net of 3 classes; digits has 10",
    ),
    (
        TRAIN,
        ["--config.teacher={}/imported", "--config.distillation=0.5"],
        "config.teacher .*imported: does not say which net it is",
    ),
    (
        TRAIN,
        ["--config.sampling=weighted", "--config.sampling_weights=0.0,0.0", "--config.instances=full,p01_r0.50"],
        r"config.sampling_weights \(0.0, 0.0\): must be finite, at least 0, and sum to more than 0",
    ),
    (
        TRAIN,
        ["--config.sampling=weighted", "--config.instances=full,p01_r0.50"],
        r"config.sampling_weights \(\): needs 2 of them, for full, p01_r0.50",
    ),
    (TRAIN, ["--config.sampling_powers=1.0,"], r"config.sampling_powers \(1.0,\): two numbers"),
    (TRAIN, ["--config.ema_decay=1"], "config.ema_decay 1.0: at least 0, less than 1"),
    (TRAIN, ["--config.validate_ema=True"], "config.validate_ema True: with config.ema_decay 0.0 there is no average"),
    (TRAIN, ["--config.optimizer=adam"], "config.optimizer 'adam': valid are sgd, adamw, lamb"),
    (TRAIN, ["--config.betas=0.9,1.0"], r"config.betas \(0.9, 1.0\): two numbers, each at least 0, less than 1"),
    (TRAIN, ["--config.weight_decay_on=some"], "config.weight_decay_on 'some': valid are all, kernels"),
    (TRAIN, ["--config.mixup=-1"], "config.mixup -1.0: at least 0"),
    (
        TRAIN,
        ["--config.mixup=0.2", "--config.batch_size=63"],
        "config.mixup 0.2: mixes images in pairs, and 63 of them",
    ),
    (TRAIN, ["--config.model.name=resnet19"], "model 'resnet19': valid are .*resnet"),
    (TRAIN, ["--config.model.dtype=float16"], "dtype 'float16': valid are float32, bfloat16"),
    (TRAIN, ["--config.dataset.name=digitz"], "'digitz'.*digits"),
    (TRAIN, ["--config.dataset.name=folder:{}/nowhere"], "nowhere"),
    (TRAIN, ["--config.dataset.name=folder:{}/no_images"], "no_images"),
    (TRAIN, ["--config.dataset.train_split=training"], "'?training'?.*train"),
    (TRAIN, ["--config.dataset.augmentation=rotate"], "config.dataset.augmentation 'rotate': .*valid: .*shift"),
    (TRAIN, ["--config.dataset.image_size=8"], r"image_size"),
    (TRAIN, ["--config.dataset.image_size=2,8"], "image size 2x8: too small for the net"),
    (TRAIN, ["--config.dataset.mean=0.1,0.2"], "config.dataset.mean .*: digits has 1 channels"),
    (TRAIN, ["--config.dataset.std=0.0,"], "config.dataset.std .*: must be positive"),
    (TRAIN, ["--config.instances=half"], "instance name 'half': valid are"),
    (TRAIN, ["--config.instances=p99_r0.50"], "instance p99_r0.50: the net has no point 99"),
    (TRAIN, ["--config.ratios=1.5,"], r"ratio 1.5 .*\(0, 1\)"),
    (TRAIN, ["--config.validation_instances=p99_r0.50"], "instance p99_r0.50: the net has no point 99"),
    (TRAIN, ["--config.init_from={}/nowhere"], "nowhere: no such checkpoint"),
    (TRAIN, ["--config.init_from={}/no_params"], "no_params: a checkpoint without parameters"),
    (TRAIN, ["--config.init_from={}/sound"], "sound: does not fit resnet20"),
    (TRAIN, ["--workdir={}/file"], "file"),
    (
        TRAIN,
        ["--workdir={}/sound"],
        r"checkpoints/3 holds a run of another config .*model.name: 'wrn10_1', 'resnet20_projection_norm'",
    ),
    (TRAIN, ["--workdir={}/hollow"], "none of the 1 checkpoints is sound"),
    (TRAIN, ["--workdir={}/other_log", "TINY"], "metrics.jsonl: no config.json beside it says that a run wrote it"),
    (TRAIN, ["--replay_step=x"], "--replay-step.*x"),
    (TRAIN, ["--replay_step=5", "--workdir={}/empty"], "checkpoints/5: no such checkpoint; there are none"),
    (TRAIN, ["--replay_step=5", "--workdir={}/sound"], "checkpoints/5: no such checkpoint; there are 3"),
    (TRAIN, ["--coordinator=localhost:1"], "--coordinator=localhost:1 .*give all three"),
    (TRAIN, ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "process-id=2: give all three"),
    (TRAIN, ["--coordinator=nonsense", "--num_processes=2", "--process_id=0"], "--coordinator=nonsense: .*HOST:PORT"),
    (TRAIN, ["--distributed"], "--distributed: .*--coordinator"),
    (TRAIN, ["--heartbeat_seconds=0"], "--heartbeat-seconds=0: at least 1"),
    (EVALUATE, ["--workdir={}/nowhere"], "nowhere: no such checkpoint"),
    (EVALUATE, ["--workdir={}/file"], "file: no such checkpoint"),
    (EVALUATE, ["--workdir={}/empty"], "empty: not a checkpoint of this project, or damaged: it has no files.json"),
    (EVALUATE, ["--workdir={}/unsaved"], "unsaved/checkpoints: holds no checkpoint yet"),
    (EVALUATE, ["--workdir={}/hollow"], "none of the 1 checkpoints is sound"),
    (EVALUATE, ["--workdir={}/truncated"], "none of the 1 checkpoints is sound"),
    (EVALUATE, ["--workdir={}/truncated/checkpoints/3"], "'record/metadata' has 9 bytes, had"),
    (EVALUATE, ["--workdir={}/altered/checkpoints/3"], "'record/metadata' was altered"),
    (EVALUATE, ["--workdir={}/missing/checkpoints/3"], "'record/metadata' is missing"),
    (EVALUATE, ["--workdir={}/escape"], "'../file' lies outside of the folder"),
    (EVALUATE, ["--workdir={}/no_params"], "no_params: a checkpoint without parameters"),
    (EVALUATE, ["--workdir={}/no_config"], "no_config: .*--config"),
    (EVALUATE, ["--workdir={}/odd_config"], "config .*python/object.*: not keys with values"),
    (EVALUATE, ["--workdir={}/alien"], "config key 'learning_rat': nearest are learning_rate;"),
    (EVALUATE, ["--workdir={}/typed"], "config.num_epochs 'ten': must be of type float"),
    (EVALUATE, ["--workdir={}/model"], "model '../../resnet': valid are"),
    (EVALUATE, ["--workdir={}/sound", "--instances=half"], "instance name 'half': valid are"),
    (EVALUATE, ["--workdir={}/sound", "--points=a"], "--points=a: give numbers with commas between them"),
    (EVALUATE, ["--workdir={}/sound", "--points=9"], r"points \[9\]: the net has"),
    (EVALUATE, ["--workdir={}/sound", "--ratios=2"], r"ratio 2.0 .*\(0, 1\)"),
    (EVALUATE, ["--workdir={}/sound", "--split=tset"], "'?tset'?.*test"),
    (EVALUATE, ["--workdir={}/sound", "--reestimate_batches=0"], "config.reestimate_batches 0: at least 1"),
    (EVALUATE, ["--workdir={}/sound", "--reestimate_images=dirty"], "--reestimate-images.*dirty.*augmented"),
    (EVALUATE, ["--workdir={}/sound", "--parameters=ema"], "--parameters=ema: .*sound holds no average"),
    (EVALUATE, ["--workdir={}/sound", "--statistics=own"], "--statistics.*own.*imported"),
    (
        EVALUATE,
        ["--workdir={}/sound", "--statistics=imported"],
        "--statistics=imported: .*sound holds no statistics, only imported weights do",
    ),
    (
        EVALUATE,
        ["--workdir={}/imported", "--config=digits", "--config.model.name=wrn10_2", SIZE, "--statistics=imported"],
        "imported: does not fit wrn10_2",
    ),
    (
        EVALUATE,
        ["--workdir={}/imported", "--config=digits", "--config.model.name=wrn10_1", SIZE, "--statistics=imported"]
        + ["--instances=full,p01_r0.50"],
        "imported statistics are those of full resolution alone, not of full, p01_r0.50",
    ),
    (EVALUATE, ["--workdir={}/newer"], "config of format 3: this version reads 1 to 2"),
    (EVALUATE, ["--workdir={}/sound", "--output={}/file"], "file"),
    (EVALUATE, ["--workdir={}/sound", "--baseline={}/empty"], "baseline .*empty: no .*sweep.json; first run"),
    (EVALUATE, ["--workdir={}/sound", "--baseline={}/bad_table"], "sweep.json is not the table of a sweep"),
    (COST, ["--model=resnet19", "--image-size=32"], "model 'resnet19': valid are"),
    (COST, ["--model=resnet20", "--image-size=big"], "'big': valid are"),
    (COST, ["--model=resnet20", "--image-size=2"], "image size 2x2: too small"),
    (COST, ["--model=resnet20", "--image-size=32", "--ratios=2"], r"ratio 2.0 .*\(0, 1\)"),
    (COST, ["--model=resnet20", "--image-size=32", "--layers=half"], "instance name 'half'"),
    (COST, ["--model=resnet20", "--image-size=32", "--channels=0"], "channels 0: at least 1"),
    (COST, [], "--model, --image-size"),
    (SELECT, ["{}/nowhere", "--max-macs=1"], "nowhere: no such checkpoint"),
    (SELECT, ["{}/sound/checkpoints/3", "--max-macs=1"], "not the artefact of a sweep"),
    (SELECT, ["{}/altered/checkpoints/3", "--max-macs=1"], "'record/metadata' was altered"),
    (SELECT, ["{}/sound", "--max-macs=many"], "--max-macs.*'many'"),
    (
        SELECT,
        ["{}/sound", "--max-macs=1"],
        "it is a run, whose artefact comes from: python evaluate.py --workdir=.*sound",
    ),
    (SELECT, ["{}/sound"], "one of the arguments --max-macs --relative-budget"),
    (IMPORT, ["{}/nowhere.pth", "--model=resnet20", "--output={}/o"], "nowhere.pth"),
    (IMPORT, ["{}/weights.onnx", "--model=resnet20", "--output={}/o"], "unknown ending; valid are .pth.tar"),
    (IMPORT, ["{}/weights.safetensors", "--model=resnet20", "--output={}/o"], "weights.safetensors"),
    (IMPORT, ["{}/weights.pth", "--model=resnet20"], "--output"),
    (IMPORT, ["{}/named.safetensors", "--model=resnet20", "--output={}/o", "--rename=fc"], "--rename=fc: give OLD:NEW"),
    (IMPORT, ["{}/named.safetensors", "--model=resnet20", "--output={}/o", "--rename=a:fc"], "no tensor has 'a'"),
    (
        IMPORT,
        ["{}/named.safetensors", "--model=resnet20", "--output={}/sound"],
        "sound: exists and is not a checkpoint",
    ),
    (IMPORT, ["{}/named.safetensors", "--model=resnet20", "--output={}/o"], "has no vector fc.bias .*--rename=OLD:fc"),
    # (PREPARE, ["no_such_set", "--data-dir={}/data"], "unknown data set 'no_such_set'; valid: digits"),
    # (PREPARE, ["imagenet2012", "--data-dir={}/data"], "imagenet2012 needs --source"),
    # (PREPARE, ["cifar10", "--source={}/empty", "--data-dir={}/data"], "empty: no .* there"),
    # (PREPARE, ["folder:{}/nowhere", "--data-dir={}/data"], "nowhere"),
    # (PREPARE, ["folder:{}/images", "--name=7 up", "--data-dir={}/data"], "--name '7 up'; valid"),
    # (PREPARE, ["digits", "--on-bad-image=stop"], "--on-bad-image.*'stop'"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_workdirs(folder)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """How each command of `CASES` ended."""
    tiny_flags = ["--config.model.name=wrn10_1", "--config.instances=full", "--config.validation_instances=full", SIZE]
    cases = []
    for command, arguments, _ in CASES:
        if command == TRAIN and not any("--workdir" in argument for argument in arguments):
            arguments = [*arguments, "--workdir={}/new"]
        arguments = [f for a in arguments for f in (tiny_flags if a == "TINY" else [a.replace("{}", str(folder))])]
        cases.append([command, *arguments])
    (folder / "cases.json").write_text(json.dumps(cases))
    forks = [sys.executable, "tests/cli/forks.py", str(folder / "cases.json"), str(folder / "results.json")]
    subprocess.run(forks, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, check=True, timeout=600)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.xdist_group("commands")  # One worker runs them all, once.
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: f"{CASES[index][0]} {' '.join(CASES[index][1])}")
def test_bad_input_is_one_line_that_names_it(ended, index):
    found, message = ended[index], CASES[index][2]
    *_, line = found["error"].strip().splitlines() or [""]
    assert found["code"] == 2, found
    assert "Traceback" not in found["error"] + found["out"]
    assert re.match(rf"error: .*{message}", line), found
    assert found["error"].strip().count("\n") == 0, found


def test_errors_of_orbaxs_threads_are_not_printed_beside_the_one_line(monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    main._quieten_orbax()
    thread = type("Thread", (), {"__module__": "orbax.checkpoint"})()
    threading.excepthook(SimpleNamespace(thread=thread))
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("Event loop is closed")))
    assert not printed
    others = [SimpleNamespace(thread=threading.current_thread()), SimpleNamespace(exc_value=RuntimeError("other"))]
    threading.excepthook(others[0])
    sys.unraisablehook(others[1])
    assert printed == others
    failure = (ValueError, ValueError("No space left on device"), None)
    for path, exc_info, shown in (("site-packages/orbax/x.py", failure, False), ("orbax/x.py", None, True)):
        record = logging.LogRecord("absl", logging.ERROR, path, 1, "x", None, exc_info)
        assert bool(logging.getLogger("absl").filter(record)) == shown
