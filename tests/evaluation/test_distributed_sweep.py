"""Several processes sweep as one."""

import sys

import processes
import pytest
import tiny

from sdpoint_jax.config import to_dict
from sdpoint_jax.evaluation import sweep
from sdpoint_jax.experiment import Experiment
from sdpoint_jax.storage import checkpoint

# evaluate.py on a host that looks late for what is measured already.
LATE = """
import time
from sdpoint_jax.cli.main import main
from sdpoint_jax.evaluation import sweep
load = sweep._load_group
sweep._load_group = lambda *args: time.sleep(3) or load(*args)
main(command="evaluate")
"""


@pytest.mark.slow
def test_a_resumed_sweep_waits_for_the_slowest_host(tmp_path, monkeypatch):
    config = tiny.config()
    experiment = Experiment(config)
    params = tiny.variables(experiment.model)["params"]
    checkpoint.save(tmp_path / "checkpoints" / "3", {"params": params}, {"config": to_dict(config)})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sweep.plot, "plot_macs", lambda *_, **__: 1 / 0)  # After all is measured.
        sweep.sweep(experiment, params, experiment.instances, tmp_path / "sweep", split="test")
    assert (tmp_path / "sweep" / "partial").is_dir()

    commands = [["evaluate.py"], ["-c", LATE]]
    started = processes.start(lambda index: [sys.executable, *commands[index], f"--workdir={tmp_path}"], 2, 1)
    first, _ = processes.finish(started)
    assert "measured before: full to p02_r0.75" in first
    assert not (tmp_path / "sweep" / "partial").exists() and (tmp_path / "sweep" / "artefact").is_dir()
