"""Kills training runs at random moments and checks that each ends as a run that nobody touched, to the bit.

    python tests/soak.py --kills=60
    python tests/soak.py --kills=60 --everything  # With every setting of training that is not the paper's.

A run of a few hundred tiny steps is started, killed (SIGKILL) and started again with the same command, until it is
through; then a new run begins, until there were as many kills as asked for. The parameters, the optimiser state and
metrics.jsonl of every run must equal those of an uninterrupted one. Prints what each kill interrupted.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import everything
import numpy as np
from flax import traverse_util

from sdpoint_jax.storage import checkpoint

ROOT = pathlib.Path(__file__).parents[1]

SETTINGS = {
    "model.name": "wrn10_1",
    "dataset.image_size": "8,8",
    "instances": "full,p01_r0.50,p02_r0.75",
    "validation_instances": "full,p01_r0.50",
    "batch_size": 16,
    "num_epochs": 4.0,  # 299 steps.
    "validate_every_epochs": 0.5,
    "reestimate_batches": 2,
    "checkpoint_every_steps": 5,
    "keep_checkpoints": 2,
    "keep_best_checkpoints": 2,
}


def command(workdir: pathlib.Path, settings) -> list[str]:
    """That starts the run in `workdir`, or goes on with it."""
    return [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *everything.as_flags(settings)]


def start(workdir: pathlib.Path, settings) -> subprocess.Popen:
    """Starts it, with its output in the file `output` beside the workdir."""
    with workdir.with_suffix(".output").open("a") as output:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(command(workdir, settings), cwd=ROOT, env=environment, stdout=output, stderr=output)


def phase(workdir: pathlib.Path) -> str:
    """What a run that was just killed was doing, from what it has left."""
    checkpoints = workdir / checkpoint.CHECKPOINTS
    temporary = list(checkpoints.glob(".*.sdpoint_jax"))
    for name, doing in (("removed", "deleting"), ("old", "renaming"), ("*", "saving")):
        if any(list(folder.glob(name)) for folder in temporary):
            return f"{doing} a checkpoint"
    if list(workdir.glob(".*.sdpoint_jax")):
        return "writing a file"
    log = workdir / "metrics.jsonl"
    if log.exists() and log.stat().st_size and not log.read_bytes().endswith(b"\n"):
        return "writing the log"
    return "stepping, validating"


def run_with_kills(workdir: pathlib.Path, settings, kills: int, rng: random.Random, starting: float, last: int):
    """One run, killed at most `kills` times, while it starts or between its first and its last steps.

    Args:
        starting: how many seconds a run takes to its first checkpoint.
        last: its last step.

    Returns:
        how often it was killed, by what it was doing.

    Raises:
        RuntimeError: it failed by itself.
    """
    killed = collections.Counter()
    while True:
        output = workdir.with_suffix(".output")
        before = output.stat().st_size if output.exists() else 0
        process = start(workdir, settings)
        if killed.total() >= kills:
            process.wait()
        elif rng.random() < 0.4:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, starting))
        else:  # By steps, not by the clock: a machine that is suddenly faster or slower changes nothing.
            _wait_for_step(rng.uniform(newest_step(workdir), 0.9 * last), workdir, process)
            time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            process.kill()
            process.wait()
            killed[phase(workdir) if "compiled" in output.read_text()[before:] else "starting, compiling"] += 1
        elif process.returncode == 0:
            return killed
        else:
            raise RuntimeError(f"{workdir}: exit code {process.returncode}: {said_last(workdir)}")


def newest_step(workdir: pathlib.Path) -> int:
    """Of the checkpoints; 0 without any."""
    return max(checkpoint.list_steps(workdir / checkpoint.CHECKPOINTS), default=0)


def _wait_for_step(step, workdir, process):
    while process.poll() is None and newest_step(workdir) <= step:
        time.sleep(0.01)


def said_last(workdir: pathlib.Path) -> str:
    """The end of a run's output."""
    return workdir.with_suffix(".output").read_text()[-2000:]


def differences(workdir: pathlib.Path, whole: pathlib.Path) -> list[str]:
    """Where two finished runs differ: names of arrays, or metrics.jsonl."""
    ours, theirs = (checkpoint.newest(path / checkpoint.CHECKPOINTS)[1] for path in (workdir, whole))
    ours, theirs = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, theirs))
    found = [name for name in ours.keys() | theirs.keys() if not _same_bits(ours.get(name), theirs.get(name))]
    logs = [(path / "metrics.jsonl").read_bytes() for path in (workdir, whole)]
    return sorted(found) + (["metrics.jsonl"] if logs[0] != logs[1] else [])


def _same_bits(ours, theirs):
    if ours is None or theirs is None:
        return False
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def soak(folder: pathlib.Path, kills: int, seed: int = 0, settings=None, say=print) -> collections.Counter:
    """Kills runs in `folder` until there were `kills` kills; returns their number by what they interrupted.

    Raises:
        RuntimeError: a run failed by itself, or ended otherwise than an uninterrupted one; names where it differs.
    """
    settings, rng, total = SETTINGS | (settings or {}), random.Random(seed), collections.Counter()
    whole = folder / "whole"
    start(whole, settings | {"num_epochs": 0.05}).wait()  # Fills the cache of compiled programs.
    shutil.rmtree(whole)
    begin, process = time.perf_counter(), start(whole, settings)
    _wait_for_step(0, whole, process)
    starting = time.perf_counter() - begin
    if process.wait():
        raise RuntimeError(f"{whole}: the uninterrupted run failed: {said_last(whole)}")
    say(f"an uninterrupted run: {time.perf_counter() - begin:.1f} s, the start {starting:.1f} s of it")
    for number in range(kills):
        workdir = folder / f"run{number}"
        killed = run_with_kills(workdir, settings, kills - total.total(), rng, starting, last=newest_step(whole))
        total += killed
        found = differences(workdir, whole)
        say(f"{workdir.name}: {killed.total()} kills, {len(found)} differences ({total.total()} kills so far)")
        if found:
            raise RuntimeError(f"{workdir}: differs from {whole} in {', '.join(found[:5])}")
        if total.total() >= kills:
            break
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="for the runs, kept; by default a temporary one")
    parser.add_argument("--everything", action="store_true", help="every setting of tests/everything.py")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        settings = everything.SETTINGS | {"num_epochs": 4.0} if options.everything else None
        total = soak(folder, options.kills, options.seed, settings)
    for doing, count in total.most_common():
        print(f"{count:>4} while {doing}")
    print(f"{total.total()} kills; every run ended as the uninterrupted one: same bits, same log")


if __name__ == "__main__":
    main()
