import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import chex
import commands
import everything
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from sdpoint_jax.config import default_config
from sdpoint_jax.data import BadImageError, from_sources
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.instance import SDPointInstance, sample_instance
from sdpoint_jax.models.norm_parameters import with_own_norms
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.profiling.macs import list_layers
from sdpoint_jax.programs.devices import Switch
from sdpoint_jax.storage import artefact, checkpoint
from sdpoint_jax.storage.lock import FolderLock
from sdpoint_jax.training import logs, plan, replay
from sdpoint_jax.training import loop as training
from sdpoint_jax.training.objective import Distillation

ROOT = pathlib.Path(__file__).parents[2]
TOTAL_STEPS = 30  # round(1197 / 40)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def as_json(results):
    return {name: dataclasses.asdict(metrics) for name, metrics in results.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, training.train(tiny.config(), workdir)


def test_each_step_is_logged_once_with_its_instance(finished):
    workdir, _ = finished
    steps = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(TOTAL_STEPS))
    instances = [SDPointInstance.from_name(name) for name in ("full", "p01_r0.50", "p02_r0.75")]
    assert [row["instance"] for row in steps] == [
        sample_instance(0, step, instances).name for step in range(TOTAL_STEPS)
    ]
    assert np.mean([row["loss"] for row in steps[-5:]]) < np.mean([row["loss"] for row in steps[:5]]) - 0.1


def test_validation_is_of_named_instances(finished):
    workdir, results = finished
    assert set(results) == {"full", "p01_r0.50"}
    assert all(found.count == 200 for found in results.values())
    assert rows(workdir)[-1] == {"step": TOTAL_STEPS - 1, "validation": as_json(results)}


def test_the_checkpoint_holds_all_that_is_needed(finished):
    workdir, results = finished
    step, arrays, record = checkpoint.newest(workdir / "checkpoints")
    assert step == arrays["step"] == record["step"] == TOTAL_STEPS
    assert record["examples_seen"] == TOTAL_STEPS * 40 and record["validation"] == as_json(results)
    assert record["class_names"] == list("0123456789") and record["config"]["model"]["name"] == "wrn10_1"
    assert "batch_stats" not in arrays  # Statistics are of an instance, and re-estimated.
    assert any(path.name.startswith("events") for path in (workdir / "tensorboard").iterdir())


def test_the_same_command_again_changes_nothing(finished, capsys):
    workdir, results = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert training.train(tiny.config(), workdir) == results
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "continuing after step 30 of 30" in capsys.readouterr().out


@contextlib.contextmanager
def stopped_at(step):
    """Asks the run that trains in the context to stop, by SIGTERM as it finishes that step; it must."""
    finish = training.Loop._finish_step

    def finish_and_stop(self, finished, *args):
        if finished == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish(self, finished, *args)

    with mock.patch.object(training.Loop, "_finish_step", finish_and_stop):
        with pytest.raises(training.Interrupted, match=r"stopped after step \d+ of"):
            yield


def test_a_stopped_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    whole, _ = finished
    with stopped_at(10):
        training.train(tiny.config(), tmp_path)
    step, _, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert 10 < step < TOTAL_STEPS
    with (tmp_path / "metrics.jsonl").open("a") as log:  # As left by a run that was killed later than it saved.
        log.write(json.dumps({"step": step, "loss": 0}) + '\n{"step": 99')
    training.train(tiny.config(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1] for path in (tmp_path, whole))
    chex.assert_trees_all_equal(ours, theirs)


def same(workdir, other):
    """Asserts that two finished runs have the same bits and the same log."""
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(*(checkpoint.newest(path / "checkpoints")[1] for path in (workdir, other)))


@pytest.fixture
def slow_compiler(monkeypatch):
    """A function that makes `wait_for(key)` precede the compilation of each key of the training programs."""
    compile_it = Switch._compile

    def slow_down(wait_for):
        def compile_slowly(self, key):
            if key == "update" or isinstance(key, tuple) and isinstance(key[0], SDPointInstance):
                wait_for(key)
            return compile_it(self, key)

        monkeypatch.setattr(Switch, "_compile", compile_slowly)

    return slow_down


def test_a_run_whose_programs_are_all_there_first_ends_as_one_that_waits_for_each(
    finished, tmp_path, monkeypatch, slow_compiler, capsys
):
    programs_of = plan.Plan.programs

    def compiled(self, state):
        programs = programs_of(self, state)
        assert len(list(programs.compile(self.sets))) == 4
        return programs

    with monkeypatch.context() as patch:
        patch.setattr(plan.Plan, "programs", compiled)
        training.train(tiny.config(), tmp_path / "first")
    assert "compiled" not in capsys.readouterr().out
    slow_compiler(lambda key: time.sleep(0.3))
    training.train(tiny.config(compile_workers=1), tmp_path / "waiting")
    out = capsys.readouterr().out
    assert re.search(r"first step after \d+\.\d s: compiled [23] of 4 programs", out)
    assert re.search(r"compiled 4 programs, one for each instance and the update: .* steps waited for \d", out)
    same(tmp_path / "first", finished[0])
    same(tmp_path / "waiting", finished[0])


def test_the_first_step_runs_before_the_programs_of_later_ones_are_there(tmp_path, monkeypatch, slow_compiler):
    config = tiny.config(num_epochs=0.3)
    first, stepped, finish = plan.Plan(config).draw(0), threading.Event(), training.Loop._finish_step

    def finish_step(self, *args):
        stepped.set()
        return finish(self, *args)

    monkeypatch.setattr(training.Loop, "_finish_step", finish_step)
    slow_compiler(lambda key: key in ("update", first) or stepped.wait(60) or pytest.fail("no step"))
    assert training.train(config, tmp_path)


def test_a_stop_does_not_wait_for_a_program_that_compiles(finished, tmp_path, monkeypatch, slow_compiler):
    found, stopped = plan.Plan(tiny.config()), threading.Event()
    late = found.sets_by_first_use(0)[-1]
    first_use = next(step for step in range(TOTAL_STEPS) if found.draw(step) == late)
    wait_for_programs = training.Loop._wait_for_programs

    def stop_and_wait(self, instances):
        if instances == late:
            os.kill(os.getpid(), signal.SIGTERM)
        wait_for_programs(self, instances)

    slow_compiler(lambda key: key != late or stopped.wait(60) or pytest.fail("no stop"))
    with monkeypatch.context() as patch, pytest.raises(training.Interrupted, match=f"after step {first_use} of 30"):
        patch.setattr(training.Loop, "_wait_for_programs", stop_and_wait)
        training.train(tiny.config(), tmp_path)
    stopped.set()
    assert checkpoint.newest(tmp_path / "checkpoints")[0] == first_use
    slow_compiler(lambda key: None)
    training.train(tiny.config(), tmp_path)
    same(tmp_path, finished[0])


def test_an_instance_whose_program_does_not_compile_is_named(tmp_path, slow_compiler):
    def fail(key):
        if key != "update" and key[0].name == "p02_r0.75":
            raise ValueError("out of memory")

    slow_compiler(fail)
    with pytest.raises(RuntimeError, match="the step of instance p02_r0.75 does not compile: out of memory"):
        training.train(tiny.config(), tmp_path)


def test_programs_are_listed_by_their_first_use_and_those_of_no_step_not_at_all():
    found = plan.Plan(tiny.config(instances="all", num_epochs=2.0))
    drawn = [found.draw(step) for step in range(found.total_steps)]
    for start in (0, 7, found.total_steps - 2, found.total_steps):
        assert found.sets_by_first_use(start) == tuple(dict.fromkeys(drawn[start:]))
    endless = plan.Plan(tiny.config(sampling="weighted", sampling_weights=(1.0, 0.0, 1.0), num_epochs=1000.0))
    assert set(endless.sets_by_first_use(3)[:2]) == {endless.sets[0], endless.sets[2]}
    assert endless.sets_by_first_use(3)[2:] == (endless.sets[1],)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another net with statistics of its own, as imported weights have them."""
    path = tmp_path_factory.mktemp("teacher") / "imported"
    checkpoint.save(path, tiny.variables(create_model("wrn10_2", 10)), {"model": {"name": "wrn10_2"}, "format": 2})
    return path


with_everything = pytest.mark.xdist_group("everything")  # One worker trains it, once.


@pytest.fixture(scope="module")
def finished_with_everything(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("everything")
    return workdir, training.train(everything.config(teacher), workdir)


def check_same_run(workdir, whole):
    logs = [(path / "metrics.jsonl").read_bytes() for path in (workdir, whole)]
    assert logs[0] == logs[1]
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1] for path in (workdir, whole))
    chex.assert_trees_all_equal(ours, theirs)


@with_everything
def test_a_stopped_run_with_every_setting_ends_as_an_uninterrupted_one(teacher, finished_with_everything, tmp_path):
    whole, results = finished_with_everything
    config = everything.config(teacher)
    with stopped_at(4):
        training.train(config, tmp_path)
    assert training.train(config, tmp_path) == results
    check_same_run(tmp_path, whole)


@with_everything
def test_what_is_trained_with_every_setting_is_swept(finished_with_everything):
    workdir, _ = finished_with_everything
    arrays = checkpoint.newest(workdir / "checkpoints")[1]
    assert set(arrays["params"]["per_instance"]) == {"p01_r0.50", "p02_r0.75", "p03_r0.50"}
    different = jax.tree.map(lambda a, b: np.any(a != b), arrays["params"], arrays["ema"])
    assert all(jax.tree.leaves(different))
    commands.run("evaluate", f"--workdir={workdir}", "--parameters=ema", "--instances=full,p01_r0.50")
    swept = artefact.load(workdir / "sweep" / "artefact")
    assert [row.name for row in swept.rows] == ["full", "p01_r0.50"]
    chex.assert_trees_all_equal(swept.params, arrays["ema"])


def start_with_everything(teacher, workdir, devices):
    """Starts the run with every setting in a process of so many devices."""
    script = (
        "import sys, everything; from sdpoint_jax.training.loop import train; "
        "train(everything.config(sys.argv[1]), sys.argv[2])"
    )
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests"))
    environment = os.environ | {
        "PYTHONPATH": paths,
        "XLA_FLAGS": processes.xla_flags(devices),
    }
    command = [sys.executable, "-c", script, str(teacher), str(workdir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@with_everything
def test_a_killed_run_with_every_setting_ends_as_an_uninterrupted_one(teacher, finished_with_everything, tmp_path):
    whole, results = finished_with_everything
    process = start_with_everything(teacher, tmp_path, devices=8)
    while not (tmp_path / "checkpoints" / "4").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    assert checkpoint.list_steps(tmp_path / "checkpoints")[-1] < everything.TOTAL_STEPS
    assert training.train(everything.config(teacher), tmp_path) == results
    check_same_run(tmp_path, whole)


@with_everything
def test_one_device_trains_with_every_setting_as_eight_do(teacher, finished_with_everything, tmp_path):
    process = start_with_everything(teacher, tmp_path, devices=1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, eight = ([row for row in rows(path) if "loss" in row] for path in (tmp_path, finished_with_everything[0]))
    assert [row["instance"] for row in one] == [row["instance"] for row in eight]
    # Rounding differs, and now and then one of a ReLU's inputs has another sign, which moves gradients a little more.
    np.testing.assert_allclose([row["loss"] for row in one], [row["loss"] for row in eight], rtol=1e-5)
    norms, expected = ([row["gradient_norm"] for row in log] for log in (one, eight))
    np.testing.assert_allclose(norms, expected, rtol=2e-4)
    np.testing.assert_allclose(norms[0], expected[0], rtol=1e-6)
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1] for path in (tmp_path, finished_with_everything[0]))
    for kind in ("params", "ema"):
        chex.assert_trees_all_close(ours[kind], theirs[kind], atol=1e-4, rtol=0)


def test_distillation_begins_after_its_share_of_the_steps():
    settings = dict(instances_per_step=2, step_instances="drawn", distillation=0.5, distillation_targets="mean")
    found = plan.Plan(tiny.config(**settings, distillation_start=0.4))
    assert found._distillation() == Distillation(0.5, targets="mean", first_step=round(0.4 * found.total_steps))


def test_draws_by_cost_go_from_cheap_to_full():
    found = plan.Plan(tiny.config(instances="all", sampling="cost", sampling_powers=(-4.0, 8.0), num_epochs=30.0))
    costs = dict(zip(found.experiment.instances, found._costs))
    drawn = [costs[found.draw(step)[0]] / max(costs.values()) for step in range(found.total_steps)]
    third = len(drawn) // 3
    assert np.mean(drawn[:third]) < np.mean(drawn[third:-third]) < np.mean(drawn[-third:])


def test_a_fixed_instance_trains_without_sdpoint(tmp_path):
    training.train(tiny.config(instances="full", num_epochs=0.1, validation_instances="auto"), tmp_path)
    assert {row["instance"] for row in rows(tmp_path) if "loss" in row} == {"full"}
    assert set(rows(tmp_path)[-1]["validation"]) == {"full"}


def test_each_instance_of_a_step_is_logged(tmp_path, capsys):
    settings = {"instances": "full,p01_r0.50,p02_r0.75,p03_r0.50", "num_epochs": 0.2}
    settings |= {"instances_per_step": 3, "distillation": 0.5}
    training.train(tiny.config(**settings), tmp_path)
    steps = [row for row in rows(tmp_path) if "loss" in row]
    for row in steps:
        assert row["instance"].split("+") == list(row["instances"]) and len(row["instances"]) == 3
        assert {"full", "p01_r0.50"} < set(row["instances"])
        for name in ("loss", "accuracy"):
            assert row[name] == pytest.approx(np.mean([one[name] for one in row["instances"].values()]), rel=1e-5)
    assert len({row["instance"] for row in steps}) > 1
    assert len([row for row in rows(tmp_path) if "loss" in row]) == 6
    printed = re.search(
        r"a step takes (\d\.\d+) of the MACs .*; 3 instances one by one would take (\d\.\d+)", capsys.readouterr().out
    )
    assert 1 < float(printed[1]) < float(printed[2])


def test_the_macs_of_a_step_are_those_of_its_layers():
    found = plan.Plan(tiny.config(instances="full,p01_r0.50,p03_r0.50", instances_per_step=3))
    model = found.experiment.model
    full = [layer.macs for layer in list_layers(model, found.sets[0][0], 8, 1)]
    halved = [layer.macs for layer in list_layers(model, SDPointInstance(1, 0.5), 8, 1)]
    of_block_1 = [layer.macs for layer in list_layers(model, found.sets[0][0], 8, 1) if "block_01" in layer.name]
    stem, head = full[0], full[-1]
    # All of full resolution; of the cheapest what follows block 1; of the other one the classifier.
    expected = sum(full) + sum(halved) - stem - sum(of_block_1) + head
    assert f"takes {expected / sum(full):.4f} of the MACs of full resolution on average" in found.describe_cost()


@pytest.mark.parametrize("has_statistics", [False, True])
def test_a_teacher_can_be_a_run_or_imported_weights_of_another_net(finished, tmp_path, has_statistics):
    source = finished[0]
    if has_statistics:
        source = tmp_path / "imported"
        other = create_model("wrn10_2", 10)
        checkpoint.save(source, tiny.variables(other), {"model": {"name": "wrn10_2"}, "format": 2})
    config = tiny.config(teacher=str(source), distillation=1.0, num_epochs=0.1, learning_rate=0.03)
    training.train(config, tmp_path / "run")
    first = rows(tmp_path / "run")[0]["loss"]
    training.train(tiny.config(num_epochs=0.1, learning_rate=0.03), tmp_path / "labels")
    assert first != rows(tmp_path / "labels")[0]["loss"]
    variables, again = (plan.Plan(config).teacher.variables(Experiment(config)) for _ in range(2))
    chex.assert_trees_all_equal(variables, again)
    has = {"stem", "block_01", "block_02", "block_03", "head"} - {"stem"}
    assert set(variables["batch_stats"]) == has  # Its stem, of a pre-activation net, has no BatchNorm.


def test_parameters_can_come_from_another_run(finished, tmp_path):
    config = tiny.config(init_from=str(finished[0]), num_epochs=0.05, learning_rate=1e-9, weight_decay=0.0)
    training.train(config, tmp_path)
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1]["params"] for path in (tmp_path, finished[0]))
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)


def own_norms(**values):
    config = tiny.config(num_epochs=0.05, learning_rate=1e-9, weight_decay=0.0, **values)
    config.model.norm_parameters = "per_instance"
    return config


def test_scales_and_shifts_of_instances_begin_as_those_of_the_net_that_is_trained_on(finished, tmp_path, capsys):
    training.train(own_norms(init_from=str(finished[0])), tmp_path / "own")
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1]["params"] for path in (tmp_path / "own", finished[0]))
    own = ours.pop("per_instance")
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)
    assert set(own) == {"p01_r0.50", "p02_r0.75"}
    count = 0
    for path, array in flatten_dict(own).items():
        np.testing.assert_allclose(array, flatten_dict(theirs)[path[1:]], atol=1e-6)
        count += array.size
    printed = capsys.readouterr().out
    assert f"parameters, shared by all instances; beside them {count} scales and shifts of single ones, 2" in printed
    # A net that shares them all begins with the shared ones; full resolution, which teaches, has no others.
    shared = dict(init_from=str(tmp_path / "own"), teacher=str(tmp_path / "own"), distillation=0.5)
    training.train(tiny.config(num_epochs=0.05, learning_rate=1e-9, weight_decay=0.0, **shared), tmp_path / "shared")
    chex.assert_trees_all_close(checkpoint.newest(tmp_path / "shared" / "checkpoints")[1]["params"], theirs, atol=1e-6)


def test_scales_and_shifts_that_instances_have_are_trained_on(finished, tmp_path):
    _, arrays, record = checkpoint.newest(finished[0] / "checkpoints")
    params = with_own_norms(tiny.net(), arrays["params"], [SDPointInstance(1, 0.5)])
    params["per_instance"] = jax.tree.map(lambda x: x + 1, params["per_instance"])
    checkpoint.save(tmp_path / "source", {"params": params}, record)
    training.train(own_norms(init_from=str(tmp_path / "source")), tmp_path / "own")
    found = checkpoint.newest(tmp_path / "own" / "checkpoints")[1]["params"]["per_instance"]
    chex.assert_trees_all_close(found["p01_r0.50"], params["per_instance"]["p01_r0.50"], atol=1e-6)
    chex.assert_trees_all_close(found["p02_r0.75"]["head"]["norm"], arrays["params"]["head"]["norm"], atol=1e-6)
    del params["per_instance"]["p01_r0.50"]["head"]
    checkpoint.save(tmp_path / "source", {"params": params}, record)
    with pytest.raises(ValueError, match=r"does not fit wrn10_1 .*: per_instance/p01_r0.50/head/norm/bias None, needs"):
        training.train(own_norms(init_from=str(tmp_path / "source")), tmp_path / "other")


def test_an_error_does_not_wait_for_programs_that_compile():
    code = """if True:
        import sys, threading, time
        from sdpoint_jax.cli import cost, main
        from sdpoint_jax.programs import devices
        def compile_long():
            with devices._rare_garbage_collection:
                begun.set()
                time.sleep(120)
        def run(args):
            threading.Thread(target=compile_long).start()
            begun.wait()
            raise ValueError("wrong")
        begun, cost.run = threading.Event(), run
        sys.argv[1:] = ["cost", "--model=resnet20", "--image-size=32"]
        main.main()
    """
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "error: wrong\n")


def test_parameters_that_do_not_fit_are_named(finished, tmp_path):
    config = tiny.config(init_from=str(finished[0]))
    config.model.name = "wrn10_2"
    with pytest.raises(ValueError, match=r"does not fit wrn10_2 .*: block_01/conv1/kernel \(3, 3, 16, 16\), needs"):
        training.train(config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_before_it(tmp_path):
    config = tiny.config(learning_rate=1e30, num_epochs=0.3)
    with pytest.raises(
        training.NonFiniteError, match=r"not finite: step (\d+), instance \S+, training examples"
    ) as error:
        training.train(config, tmp_path)
    step, arrays, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert f"step {step}," in str(error.value) and arrays["step"] == step
    assert rows(tmp_path)[-1]["step"] == step - 1
    assert all(np.isfinite(value).all() for value in arrays["params"]["stem"]["conv"].values())


def test_a_step_that_is_not_finite_can_be_replayed_alone(tmp_path):
    config = tiny.config(learning_rate=1e30, num_epochs=0.3)
    with pytest.raises(training.NonFiniteError, match=r"--replay-step=\d+ shows") as error:
        training.train(config, tmp_path)
    step = checkpoint.list_steps(tmp_path / "checkpoints")[0]
    files = sorted(tmp_path.rglob("*"))
    report = replay.replay(config, tmp_path, step)
    assert str(error.value).split(": ")[1] in report.splitlines()[0]  # The same step, instance and examples.
    assert "head/dense/kernel: 640 of 640 gradients not finite" in report
    assert re.search(r"not finite in [1-9]\d* of \d+ arrays$", report)
    assert sorted(tmp_path.rglob("*")) == files


def test_skipped_steps_are_counted_across_restarts(tmp_path, capsys):
    config = tiny.config(learning_rate=1e30, num_epochs=0.3, on_nonfinite="skip", checkpoint_every_steps=4)
    with stopped_at(4):
        training.train(config, tmp_path)
    training.train(config, tmp_path)
    counts = [row["skipped"] for row in rows(tmp_path) if "skipped" in row]
    assert counts == list(range(1, len(counts) + 1)) and len(counts) >= 5
    assert f"skipped {len(counts)} of 9 steps" in capsys.readouterr().out


def test_damaged_checkpoints_are_moved_aside_and_the_run_ends_as_any_other(finished, tmp_path, capsys):
    whole, _ = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "checkpoints" / "30" / "record" / "metadata"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    training.train(tiny.config(), tmp_path)
    assert "skipping a damaged checkpoint" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"20", "30", "30.damaged"}
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (checkpoint.newest(path / "checkpoints")[1] for path in (tmp_path, whole))
    chex.assert_trees_all_equal(ours, theirs)


def test_the_checkpoints_best_by_the_metric_of_an_instance_are_kept(tmp_path):
    config = tiny.config(
        validate_every_epochs=0.2, checkpoint_every_steps=100, keep_checkpoints=1, keep_best_checkpoints=2
    )
    config.best_metric = "p01_r0.50/loss"
    training.train(config, tmp_path)
    validations = [row for row in rows(tmp_path) if "validation" in row]
    assert len(validations) == 5
    by_loss = sorted(validations, key=lambda row: row["validation"]["p01_r0.50"]["loss"])
    kept = {row["step"] + 1 for row in by_loss[:2]} | {TOTAL_STEPS}
    assert set(checkpoint.list_steps(tmp_path / "checkpoints")) == kept


def test_checkpoints_are_saved_as_minutes_go_by(tmp_path):
    config = tiny.config(num_epochs=0.3, checkpoint_every_steps=100, checkpoint_every_minutes=1e-9, keep_checkpoints=9)
    training.train(config, tmp_path)
    assert len(checkpoint.list_steps(tmp_path / "checkpoints")) > 1


def test_a_validation_that_is_interrupted_is_made_up_for(finished, tmp_path, monkeypatch):
    whole, results = finished
    validate = training.Loop._validate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Loop, "_validate", interrupted)
        with pytest.raises(training.Interrupted, match="stopped after step 30 of 30"):
            training.train(tiny.config(), tmp_path)
    assert not any("validation" in row for row in rows(tmp_path))
    assert training.train(tiny.config(), tmp_path) == results
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert checkpoint.newest(tmp_path / "checkpoints")[2]["validation"] == as_json(results)


def test_a_bad_image_in_a_validation_does_not_cost_the_steps_before_it(finished, tmp_path, monkeypatch):
    def evaluation_batches(self, split):
        raise BadImageError("truncated", "cat/1.png")

    config = tiny.config(checkpoint_every_steps=1000)
    with monkeypatch.context() as patch, pytest.raises(BadImageError, match="cat/1.png: truncated"):
        patch.setattr(Experiment, "evaluation_batches", evaluation_batches)
        training.train(config, tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints")[0] == TOTAL_STEPS
    training.train(config, tmp_path)
    same(tmp_path, finished[0])


@pytest.fixture
def full_disk(tmp_path):
    """A function that makes a folder on a disk of that many MiB."""
    with contextlib.ExitStack() as stack:

        def mount(mebibytes):
            made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(tmp_path)])
            if made.returncode:
                pytest.skip("needs the right to mount a tmpfs")
            stack.callback(subprocess.run, ["umount", "-l", str(tmp_path)], check=True)
            return tmp_path

        yield mount


def fill(folder):
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's threads.
def test_a_disk_that_fills_up_leaves_the_checkpoints_sound(full_disk):
    workdir = full_disk(8)
    with stopped_at(10):
        training.train(tiny.config(), workdir)
    step, arrays, _ = checkpoint.newest(workdir / "checkpoints")
    fill(workdir)
    with pytest.raises(OSError, match=f"^{workdir}/.*: could not be written: No space left on device"):
        training.train(tiny.config(), workdir)
    (workdir / "filling").unlink()
    with pytest.raises(OSError, match=f"^{workdir}/checkpoints/40: could not be written: No space left on device"):
        checkpoint.save(workdir / "checkpoints" / "40", {"params": {"x": np.random.RandomState(0).randn(2**21)}}, {})
    found, again, _ = checkpoint.newest(workdir / "checkpoints")
    assert found == step
    chex.assert_trees_all_equal(arrays, again)
    assert training.train(tiny.config(), workdir)


class FullAfter:
    """A file that takes so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, text):
        self._room -= len(text)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(text)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_log_that_cannot_be_written_stops_the_run_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    attach = logs.RunLog._open

    def attach_full(self, *args):
        attach(self, *args)
        self._file = FullAfter(self._file, 500)

    monkeypatch.setattr(logs.RunLog, "_open", attach_full)
    config = tiny.config(num_epochs=0.3, checkpoint_every_steps=2)
    message = f"{tmp_path}: cannot write the log: No space left on device"
    with pytest.raises(OSError, match=message + " .config.on_log_error=continue"):
        training.train(config, tmp_path)
    step, _, _ = checkpoint.newest(tmp_path / "checkpoints")
    assert 0 < step < 9
    assert training.train(tiny.config(num_epochs=0.3, on_log_error="continue"), tmp_path)
    assert f"{message}; training goes on without it" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "checkpoints")[0] == 9


def test_a_log_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is no row of a log"):
        logs.RunLog(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\nnonsense\n'


def test_a_file_of_a_checkpoint_or_a_workdir_cannot_be_written_where_all_is_read_only(finished, full_disk):
    workdir = full_disk(8)
    shutil.copytree(finished[0], workdir / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(workdir)], check=True)
    with pytest.raises(OSError, match=f"Read-only file system: '{workdir}/run/lock'"):
        training.train(tiny.config(), workdir / "run")
    with pytest.raises(OSError, match=f"^{workdir}/run/x: could not be written: Read-only file system"):
        checkpoint.save(workdir / "run" / "x", {"a": np.zeros(1)}, {})
    assert checkpoint.newest(workdir / "run" / "checkpoints")[0] == TOTAL_STEPS


@pytest.mark.slow
def test_killed_runs_end_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", processes.xla_flags(1))
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))
    import soak

    lines = []
    settings = {"num_epochs": 1.0, "keep_best_checkpoints": 1}
    assert soak.soak(tmp_path, 2, seed=1, settings=settings, say=lines.append).total() == 2
    assert all("0 differences" in line for line in lines[1:])


def test_another_config_in_the_same_workdir_is_refused(finished):
    with pytest.raises(ValueError, match="holds a run of another config .there, here.: learning_rate: 0.1, 0.2"):
        training.train(tiny.config(learning_rate=0.2), finished[0])


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
    with (
        FolderLock(tmp_path, "workdir"),
        pytest.raises(ValueError, match=f"{tmp_path}: in use by another run .process {os.getpid()}"),
    ):
        training.train(tiny.config(), tmp_path)
    with FolderLock(tmp_path, "workdir"):
        pass  # Free again.


def test_a_second_interrupt_ends_the_process_at_once():
    code = """if True:
        import signal
        from sdpoint_jax.training.stop import StopSignals
        with StopSignals() as signals:
            signals.unsaved = True
            signal.raise_signal(signal.SIGINT)
            print(signals.received, flush=True)
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                print("still here")
    """
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "True\n")


def test_a_stop_before_there_is_anything_to_save_ends_the_process_at_once():
    code = """if True:
        import signal
        from sdpoint_jax.training.stop import StopSignals
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
    """
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (75, 1)


def test_the_end_after_a_stop_waits_for_no_thread():
    code = """if True:
        import concurrent.futures, time
        from sdpoint_jax.training import stop
        concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 120)
        print("saved")
        stop.leave()
    """
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (75, "saved\n")


def test_parameters_that_do_not_fit_are_found_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(plan.Plan, "programs", lambda *_: pytest.fail("compiles"))
    checkpoint.save(tmp_path / "other", tiny.variables(create_model("wrn10_2", 10)), {"model": {"name": "wrn10_2"}})
    with pytest.raises(ValueError, match="config.init_from .*other: does not fit wrn10_1"):
        training.train(tiny.config(init_from=str(tmp_path / "other")), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "resnet19"}}, "model 'resnet19': valid are .*resnet"),
        ({"model": {"dtype": "float16"}}, "dtype 'float16': valid are float32, bfloat16"),
        ({"dataset": {"name": "digitz"}}, "digitz"),
        ({"dataset": {"augmentation": "rotate"}}, "rotate.*shift"),
        ({"dataset": {"train_split": "training"}}, "config.dataset.train_split: unknown split 'training'"),
        ({"dataset": {"validation_split": "tset"}}, "config.dataset.validation_split: unknown split 'tset' .* test "),
        ({"dataset": {"test_split": "tset"}}, "config.dataset.test_split: unknown split 'tset' .* test "),
        ({"dataset": {"mean": (0.5, 0.5, 0.5)}}, "config.dataset.mean .*: digits has 1 channels, one value each"),
        ({"dataset": {"image_size": (3, 8)}}, "image size 3x8: too small for the net, which needs sides of at least 4"),
        ({"batch_size": 41}, "config.batch_size 41: does not divide over 8 devices; the nearest is 40 or 48"),
        ({"instances": "full,p04_r0.50"}, "instance p04_r0.50: the net has no point 4; it has 0 .* and 1 to 3"),
        ({"instances": "stem_r0.50"}, "no point -1"),
        ({"instances": "half"}, "instance name 'half': valid are"),
        ({"instances": "all", "ratios": (1.5,)}, r"ratio 1.5 at point 1: a downsampling ratio lies in \(0, 1\)"),
        ({"instances": "all", "points": (7,)}, r"points \[7\]: the net has 0 .* and 1 to 3"),
        ({"sampling": "random"}, "sampling 'random': valid are uniform, legacy, weighted, cost"),
        ({"init_from": "nowhere"}, "nowhere: no such checkpoint"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, message):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message) as error:
        training.train(tiny.config(**change), workdir)
    assert "\n" not in str(error.value)
    assert not (workdir / "checkpoints").exists()


def test_a_data_set_of_one_class_cannot_be_mixed():
    experiment = SimpleNamespace(dataset=SimpleNamespace(num_classes=1, name="cats"))
    with pytest.raises(ValueError, match="config.mixup 0.2: cats has one class, nothing to mix"):
        plan._mixing(tiny.config(mixup=0.2), experiment, 4)


def test_the_learning_rate_follows_the_config():
    config = ConfigDict(default_config())
    config.update({"learning_rate": 0.1, "schedule": "step", "milestones": (2, 3), "decay": 0.1, "warmup_epochs": 1.0})
    schedule = plan.learning_rate_of(config, steps_per_epoch=10, total_steps=40)
    expected = {0: 0.0, 5: 0.05, 10: 0.1, 19: 0.1, 20: 0.01, 29: 0.01, 30: 0.001}
    assert {step: pytest.approx(float(schedule(step)), rel=1e-5) for step in expected} == expected
    config.schedule = "cosine"
    schedule = plan.learning_rate_of(config, steps_per_epoch=10, total_steps=40)
    np.testing.assert_allclose([schedule(10), schedule(25), schedule(40)], [0.1, 0.05, 0.0], atol=1e-7)


def test_milestones_that_round_to_one_step_decay_once_each():
    config = ConfigDict(default_config())
    config.update({"learning_rate": 1.0, "schedule": "step", "milestones": (1.01, 1.04, 3), "decay": 0.1})
    schedule = plan.learning_rate_of(config, steps_per_epoch=10, total_steps=40)
    assert [float(schedule(step)) for step in (9, 10, 30)] == pytest.approx([1.0, 0.01, 0.001])


def test_evaluation_batches_are_rounded_up_to_the_devices():
    assert Experiment(tiny.config(evaluation_batch_size=20)).evaluation_batch_size == 24


def hinge(logits, batch):
    """A loss of a user's own, with a metric."""
    margins = [1 - jnp.take_along_axis(own, batch["labels"][:, None], 1) for own in logits.values()]
    return jax.nn.relu(jnp.stack(margins)).mean(), {"margin": jnp.stack(margins).max()}


def test_a_loss_and_images_of_the_users_own(tmp_path):
    config = tiny.config(instances="full", validation_instances="full", num_epochs=2.0, reestimate_batches=1)
    images, labels = tiny.batch(40).values()
    own = {split: list(zip(images, labels)) for split in ("train", "test")}
    own = from_sources(own, class_names="0123456789", name="mine", image_size=(8, 8))
    found = training.train(config, tmp_path, loss=hinge, dataset=own)
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert len(steps) == 2 and all(row["margin"] >= row["loss"] for row in steps)
    assert found["full"].count == 40 and config.loss.endswith(":hinge")
    config.loss = ""
    with pytest.raises(ValueError, match="another config .*: loss: '.*:hinge', ''"):
        training.train(config, tmp_path, dataset=own)
    config.label_smoothing = 0.1
    with pytest.raises(ValueError, match="config.label_smoothing 0.1: has no effect with config.loss .*:hinge"):
        training.train(config, tmp_path, loss=hinge, dataset=own)
    config.update(label_smoothing=0.0, loss="optax:l2_los")
    with pytest.raises(ValueError, match="config.loss 'optax:l2_los': optax has no 'l2_los': valid are l2_loss"):
        training.train(config, tmp_path, dataset=own)
