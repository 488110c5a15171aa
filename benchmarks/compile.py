"""Compiling: seconds per program, total work, one after the other against concurrently, cold against cached.

    python benchmarks/compile.py --net=preresnet101:224:16 --instances=6 --json=compile.json

Each way in a fresh process, for instances spread over the net:

    naive       one whole step per instance, the update inside, as XLA compiles by itself, one after the other
    sequential  the project's programs (gradients per instance, one update), one after the other
    concurrent  the same in as many threads as there are cores, into an empty persistent cache
    cached      the same again, from that cache

`--sample` limits the first two to that many instances; their totals are then scaled up. `--cache` names the folder of
the cache, for other programs to use; by default it is a temporary one. `--step-time=yes` also times the naive step
against ours, at full resolution. Last comes the memory that the project's programs need beside the batch, the
parameters and the gradients: that of the instance that needs most, over that of full resolution.

`--train=yes` measures instead, as `train.py` runs, from the start of the process on: the time to the end of the first
step, and to the end of a run of `--steps` steps that draw from all instances, on the digits. Its ways:

    first       all programs are compiled before the first step, into an empty cache
    behind      programs are compiled behind the steps, in the order of their first use, as the project does
    kept        the same again, from that cache

The time that a way loses to compiling is what its run takes longer than that with the programs kept. All must end with
the same parameters, to the bit.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib

import jax
from common import report
from common.workload import OPTIMIZER, SCHEDULE, Setting, Training, preprocess

from sdpoint_jax.config import default_config
from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.programs.devices import AXIS, REPLICATED, SHARDED, Switch, shapes_of
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training import loop, plan
from sdpoint_jax.training import step as steps

WAYS = ("naive", "sequential", "concurrent", "cached")
TRAINING_WAYS = ("first", "behind", "kept")
_COMMON = dict(workers=0, cache="", step_time=False, train=False, steps=150)
PRESETS = {
    "small": dict(net="resnet20:32:128", dtype="float32", instances=5, sample=2, **_COMMON),
    "cpu": dict(net="preresnet101:224:16", dtype="float32", instances=4, sample=2, **_COMMON),
    "gpu": dict(net="preresnet101:224:256", dtype="bfloat16", instances=69, sample=2, **_COMMON | {"step_time": True}),
}


class NaiveTraining(Training):
    """The same training with the whole step in each instance's program."""

    def __init__(self, setting: Setting, dtype: str):
        super().__init__(setting, dtype)
        kwargs = dict(model=setting.model(dtype), preprocess=preprocess)

        def build(instance):
            def step(state, control, batch):
                grads, metrics = steps.gradient_step(state.params, control, batch, instances=(instance,), **kwargs)
                return steps.update_step(state, control, grads, metrics, optimizer=OPTIMIZER, schedule=SCHEDULE)

            axes = (REPLICATED, SHARDED, SHARDED)
            mapped = jax.pmap(step, axis_name=AXIS, in_axes=axes, out_axes=REPLICATED, donate_argnums=(0,))
            return lambda *shapes: mapped.lower(*shapes).compile()

        self.programs = Switch(build, lambda _: shapes_of((self._state, steps.Control(0).shard(), self._batch)))


def compile_one_way(options) -> dict:
    """Measures wall time and the seconds of each program, in this process."""
    workload = (NaiveTraining if options.way == "naive" else Training)(options.net, options.dtype)
    concurrent = options.way in ("concurrent", "cached")
    count = options.instances if concurrent else min(options.sample, options.instances)
    workers = (options.workers or os.cpu_count()) if concurrent else 1
    start, cpu = time.perf_counter(), time.process_time()
    instances = report.spread(options.net.model().instances(), count)
    seconds = dict(workload.programs.compile(instances, workers))
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "workers": workers,
        "seconds": {str(key): value for key, value in seconds.items()},
        "temporary_bytes": temporary_bytes(workload.programs, instances) if options.way == "concurrent" else None,
    }


def train_one_way(options) -> dict:
    """Trains in this process; measures seconds from its start to the ends of the steps, and digests the parameters."""
    config, ends = default_config(), []
    config.model.name, config.model.dtype = options.net.name, options.dtype
    config.dataset.image_size = (options.net.image_size,) * 2
    config.batch_size, config.compile_workers = options.net.batch_size, options.workers
    config.num_epochs = options.steps * config.batch_size / 1197  # Training images of the digits.
    config.validation_instances, config.reestimate_batches = "full", 1
    config.validate_every_epochs = config.num_epochs
    finish, programs_of = loop.Loop._finish_step, plan.Plan.programs

    def finish_step(*args):
        agreed = finish(*args)
        ends.append(time.time() - options.started)
        return agreed

    def compiled_programs(self, state):
        programs = programs_of(self, state)
        for _ in programs.compile(self.sets, options.workers):
            pass
        return programs

    loop.Loop._finish_step = finish_step
    if options.way == "first":
        plan.Plan.programs = compiled_programs
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(config, workdir)
        _, arrays, _ = checkpoint.newest(pathlib.Path(workdir, checkpoint.CHECKPOINTS))
    digest = zlib.crc32(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(arrays)))
    return {"first_step": ends[0], "run": ends[-1], "steps": len(ends), "digest": digest}


def compare_training(options) -> None:
    """Trains in all ways, each in a process of its own, and prints what each takes."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as behind:
        caches = {"first": first, "behind": behind, "kept": behind}
        ways = {way: in_fresh_process(way, options, caches[way]) for way in TRAINING_WAYS}
    for row in ways.values():
        row["lost"] = row["run"] - ways["kept"]["run"]
    if len({row["digest"] for row in ways.values()}) > 1:
        raise RuntimeError(f"the ways end with different parameters: {ways}")
    report.write(options.json, options, ways=ways)
    print(report.heading())
    title = f"{options.net}, {ways['first']['steps']} steps"
    print(f"{title:36}{'to the first step, s':>24}{'to the last, s':>20}{'lost to compiling, s':>24}")
    for way, row in ways.items():
        print(f"{way:36}{row['first_step']:>24.1f}{row['run']:>20.1f}{row['lost']:>24.1f}")
    print("all ended with the same parameters, to the bit")


def temporary_bytes(programs: steps.TrainPrograms, instances) -> dict[str, int]:
    """Returns what an instance's program needs of memory beside its arguments and results, as XLA plans it."""
    return {i.name: programs.gradients(i).memory_analysis().temp_size_in_bytes for i in instances}


def in_fresh_process(way: str, options, cache: str | None) -> dict:
    """Returns what one way finds in a process of its own, with a persistent cache if a folder is named."""
    command = [sys.executable, __file__, f"--way={way}", f"--net={options.net}", f"--dtype={options.dtype}"]
    command += [f"--{name}={getattr(options, name)}" for name in ("instances", "sample", "workers", "steps")]
    command += [f"--started={time.time()}"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def scaled_total(way: dict, instances: int) -> float:
    """Returns wall time one after the other for all instances, from that of a sample."""
    shared = way["seconds"].get("update", 0.0)
    own = [seconds for key, seconds in way["seconds"].items() if key != "update"]
    return shared + sum(own) / len(own) * instances


def step_time(setting: Setting, dtype: str) -> dict:
    """Measures seconds of our step, of two programs, and of the naive one."""
    workloads = {"ours": Training(setting, dtype), "naive": NaiveTraining(setting, dtype)}
    runs = {
        name: functools.partial(workload.seconds_per_step, [FULL_RESOLUTION] * 10)
        for name, workload in workloads.items()
    }
    seconds = report.take_turns(runs, 3)
    return {name: report.summary(values) for name, values in seconds.items()} | {
        "ours_over_naive": report.ratio(seconds["ours"], seconds["naive"])
    }


def parse():
    """Parses the command line: of the whole benchmark, or of one way in a process of its own."""
    if any(argument.startswith("--way=") for argument in sys.argv):
        parser = argparse.ArgumentParser()
        flags = dict(way=str, net=Setting.parse, dtype=str, started=float)
        for name, kind in (flags | dict.fromkeys(("instances", "sample", "workers", "steps"), int)).items():
            parser.add_argument(f"--{name}", type=kind)
        return parser.parse_args()
    options = report.parse(
        __doc__,
        PRESETS,
        instances=(int, "to compile, spread over the net"),
        sample=(int, "instances of the ways one after the other"),
        workers=(int, "threads; 0 for as many as cores"),
        cache=(str, "folder of the persistent cache, empty or new"),
        step_time=(report.switch, "yes or no"),
        train=(report.switch, "yes or no"),
        steps=(int, "of a run, with --train"),
    )
    options.way = None
    return options


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = parse()
    if options.way:
        measure = train_one_way if options.way in TRAINING_WAYS else compile_one_way
        print(json.dumps(measure(options)))
        return
    if options.train:
        compare_training(options)
        return
    options.instances = min(options.instances, len(Setting.parse(options.net).model().instances()))
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or temporary
        ways = {way: in_fresh_process(way, options, cache if way in WAYS[2:] else None) for way in WAYS}
    totals = {way: scaled_total(ways[way], options.instances) for way in ("naive", "sequential")}
    totals |= {way: ways[way]["wall"] for way in ("concurrent", "cached")}
    cores = ways["concurrent"]["workers"]
    ratios = {
        "naive over sequential, work": totals["naive"] / totals["sequential"],
        "naive over concurrent, wall time": totals["naive"] / totals["concurrent"],
        "sequential over concurrent, wall time": totals["sequential"] / totals["concurrent"],
        f"the same per core, of {cores}": totals["sequential"] / totals["concurrent"] / cores,
        "cached over concurrent, wall time": totals["cached"] / totals["concurrent"],
    }
    temporary = ways["concurrent"]["temporary_bytes"]
    ratios["largest temporary memory over full resolution's"] = max(temporary.values()) / temporary["full"]
    results = {"ways": ways, "total_seconds": totals, "ratios": ratios}
    if options.step_time:
        results["step_seconds"] = step_time(Setting.parse(options.net), options.dtype)
    report.write(options.json, options, **results)
    print(report.heading())
    title = f"{options.net}, {options.instances} instances"
    print(f"{title:36}{'total wall, s':>20}{'median per program, s':>28}{'measured':>12}")
    for way, row in ways.items():
        own = report.summary([seconds for key, seconds in row["seconds"].items() if key != "update"])
        print(f"{way:36}{totals[way]:>20.1f}{report.show(own):>28}{own['n']:>12}")
    for name, value in ratios.items():
        print(f"{name:48}{value:8.2f}")
    if options.step_time:
        print(f"our step over the naive one: {report.show(results['step_seconds']['ours_over_naive'])}")


if __name__ == "__main__":
    main()
