"""Several processes, as on the hosts of a pod, give what one gives."""

import json
import signal
import sys
import time

import chex
import everything
import processes
import pytest
import tiny

from sdpoint_jax.models.registry import create_model
from sdpoint_jax.storage import checkpoint

OVERRIDES = (
    "--config.model.name=wrn10_1",
    "--config.dataset.image_size=8,8",
    "--config.instances=full,p01_r0.50",
    "--config.validation_instances=full",
    "--config.batch_size=40",
    "--config.num_epochs=1.0",
    "--config.warmup_epochs=0.0",
    "--config.learning_rate=0.0001",  # So low that rounding, which sums in another order, does not grow.
    "--config.reestimate_batches=2",
    "--config.checkpoint_every_steps=5",
)


def start(workdir, count, devices, *flags):
    """Starts train.py in so many processes of so many devices each."""
    command = [sys.executable, "train.py", f"--workdir={workdir}", *flags]
    return processes.start(lambda index: command, count, devices)


def params_of(workdir):
    _, arrays, _ = checkpoint.newest(workdir / "checkpoints")
    return arrays["params"]


def wait_for(step, started, workdir):
    """Until there is a checkpoint of that step or a later one."""
    while max([0, *checkpoint.list_steps(workdir / "checkpoints")]) < step:
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)


def stop_after(step, started, workdir):
    """Stops a run by a signal to any one of its processes; returns the step that all of them name."""
    wait_for(step, started, workdir)
    started[-1].send_signal(signal.SIGTERM)
    outputs = processes.finish(started, code=75)
    stopped_at, _, _ = checkpoint.newest(workdir / "checkpoints")
    assert step <= stopped_at < 30
    assert all(f"stopped after step {stopped_at} of 30" in output for output in outputs)
    return stopped_at


def test_hosts_that_are_given_different_configs_all_refuse_to_begin(tmp_path):
    command = [sys.executable, "train.py", f"--workdir={tmp_path}", *OVERRIDES]
    outputs = processes.finish(processes.start(lambda index: [*command, f"--config.seed={index}"], 2, 1), code=2)
    assert all("differ in config.seed: 0 (host 0), 1 (host 1)" in output for output in outputs)
    assert not any("Traceback" in output for output in outputs) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0])  # The one that coordinates.
def test_a_process_that_dies_ends_the_others(tmp_path, dies):
    started = start(tmp_path, 2, 1, *OVERRIDES, "--config.num_epochs=50.0", "--heartbeat-seconds=10")
    wait_for(10, started, tmp_path)
    started[dies].kill()
    output, _ = started[1 - dies].communicate(timeout=120)
    assert started[1 - dies].returncode not in (0, 75) and "error" in output.lower()
    assert "Traceback" not in output
    started[dies].communicate()


def flags_of_everything(folder):
    """With every setting on, and another net, untrained, with statistics of its own as the teacher."""
    variables = tiny.variables(create_model("wrn10_2", 10))
    checkpoint.save(folder / "teacher", variables, {"model": {"name": "wrn10_2"}, "format": 2})
    return everything.flags(folder / "teacher", batch_size=40, num_epochs=1.0, checkpoint_every_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "tolerance"), [("paper", 1e-6), ("everything", 5e-4)])
def test_two_processes_train_as_one_and_stop_together(tmp_path, settings, tolerance):
    flags = flags_of_everything(tmp_path) if settings == "everything" else OVERRIDES
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(one, 1, 4, *flags)
    processes.finish(alone)

    stopped_at = stop_after(5, start(two, 2, 2, *flags), two)
    last = start(two, 1, 4, *flags)
    if settings == "paper":  # With every setting, another change of the hosts would cost half a minute.
        stop_after(stopped_at + 5, last, two)
        last = start(two, 2, 2, *flags)
    first, *others = processes.finish(last)
    assert "top-1" in first and "continuing after" not in "".join(others)

    chex.assert_trees_all_close(params_of(one), params_of(two), atol=tolerance, rtol=0)
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, two)]
    drawn = [[(row["step"], row.get("instance")) for row in log] for log in rows]
    assert drawn[0] == drawn[1]
