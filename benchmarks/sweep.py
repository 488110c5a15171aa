"""The sweep: all instances in one pass that shares prefixes, against every instance by itself.

    python benchmarks/sweep.py --nets=resnet20:32:128 --json=sweep.json

Both re-estimate BatchNorm statistics from the same random batches and evaluate on the same; `differs` is the largest
difference of statistics and losses, relative to the largest value. By itself, an instance is one whole program. Full
passes are MACs over those of full resolution. Compiling is timed apart.
"""

import functools
import os

import jax
import numpy as np
from common import report
from common.workload import OPTIMIZER, Setting, preprocess, random_batch

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.models.functional import cross_entropy
from sdpoint_jax.models.shared_trace import reestimating
from sdpoint_jax.profiling.macs import count_macs, count_suffix_macs
from sdpoint_jax.programs.devices import compiler_options
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.training.step import create_state

PRESETS = {
    "small": dict(nets="resnet20:32:128", dtype="float32", batches=2, rounds=2, instances=0),
    "cpu": dict(nets="resnet20:32:128,preresnet50:224:16", dtype="float32", batches=2, rounds=3, instances=0),
    "gpu": dict(nets="resnet50:224:256", dtype="bfloat16", batches=4, rounds=3, instances=0),
}


class OneByOne:
    """Every instance as a whole program of its own: one for a batch's moments, one for its metrics."""

    def __init__(self, model, instances, batch):
        self._model, self._instances = model, instances
        self._batch = jax.eval_shape(lambda: batch)
        self._programs = {}

    def compile(self, params) -> None:
        statistics = jax.eval_shape(functools.partial(self._moments, FULL_RESOLUTION), params, self._batch["images"])
        for instance in self._instances:
            moments = jax.jit(functools.partial(self._moments, instance)).lower(params, self._batch["images"])
            metrics = jax.jit(functools.partial(self._metrics, instance)).lower(params, statistics, self._batch)
            self._programs[instance] = moments.compile(compiler_options()), metrics.compile(compiler_options())

    def run(self, params, batches) -> tuple[dict, dict]:
        """Statistics and mean losses, by instance."""
        statistics, losses = {}, {}
        for instance, (moments, metrics) in self._programs.items():
            statistics[instance] = _pool([moments(params, batch["images"]) for batch in batches])
            losses[instance] = np.mean([metrics(params, statistics[instance], batch) for batch in batches])
        return statistics, losses

    def _moments(self, instance, params, images):
        with reestimating():
            _, updated = self._model.apply(
                {"params": params}, preprocess(images), instance=instance, train=True, mutable=["batch_stats"]
            )
        return updated["batch_stats"]

    def _metrics(self, instance, params, statistics, batch):
        variables = {"params": params, "batch_stats": statistics}
        logits = self._model.apply(variables, preprocess(batch["images"]), instance=instance, train=False)
        return cross_entropy(logits, batch["labels"]).mean()


def _pool(batches):
    """Pools the moments over all batches, from those of each."""
    parts = [jax.device_get(part) for part in batches]

    def pool(*parts):
        if "mean" not in parts[0]:
            return {name: pool(*(part[name] for part in parts)) for name in parts[0]}
        means, variances = (np.stack([part[name] for part in parts], dtype=np.float64) for name in ("mean", "var"))
        mean = means.mean(0)
        return {"mean": np.float32(mean), "var": np.float32((variances + means**2).mean(0) - mean**2)}

    return pool(*parts)


def passes(model, instances, image_size: int) -> dict[str, float]:
    """Counts MACs of both ways over those of full resolution."""
    total = count_macs(model, FULL_RESOLUTION, image_size)
    starts = [model.last_shared_point(instance) for instance in instances]
    one_by_one = sum(count_macs(model, instance, image_size) for instance in instances)
    suffixes = sum(count_suffix_macs(model, *part, image_size) for part in zip(instances, starts))
    prefix = total - count_suffix_macs(model, FULL_RESOLUTION, max(starts), image_size)
    return {"one_by_one": one_by_one / total, "shared": (prefix + suffixes) / total}


def difference(found, expected) -> float:
    """Returns the largest difference over leaves, each relative to its largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


def timed(clock, function, *args):
    """Returns seconds of a call by one of `report.CLOCKS`, and its result."""
    now = report.CLOCKS[clock]
    start = now()
    result = function(*args)
    return now() - start, result


def measure(setting: Setting, options) -> dict:
    """Measures sweeps of one net, shared and one by one: seconds, passes, and how far their numbers are apart."""
    model = setting.model(options.dtype)
    instances = model.instances()
    if options.instances:
        instances = report.spread(instances, options.instances)
    batches = [
        random_batch(setting, seed) | {"mask": np.ones(setting.batch_size, np.float32)}
        for seed in range(options.batches)
    ]
    shape = batches[0]["images"].shape
    params = create_state(model, OPTIMIZER, 0, setting.image_shape).params
    evaluator = Evaluator(model, instances, image_shape=shape[1:], batch_size=shape[0], preprocess=preprocess)
    one_by_one = OneByOne(model, instances, batches[0])
    compile_shared, _ = timed("wall", lambda: list(evaluator.compile(os.cpu_count())))
    compile_one_by_one, _ = timed("wall", one_by_one.compile, params)
    memory, found = {}, {}

    def run_shared():
        statistics = evaluator.reestimate(params, batches)
        metrics = evaluator.evaluate(params, statistics, batches)
        return statistics, {instance: metrics[instance].loss for instance in metrics}

    def run(name, function, *args):
        seconds, found[name] = timed(options.clock, function, *args)
        memory.setdefault(name, report.memory_peak())
        return seconds

    seconds = report.take_turns(
        {
            "one_by_one": functools.partial(run, "one_by_one", one_by_one.run, params, batches),
            "shared": functools.partial(run, "shared", run_shared),
        },
        options.rounds,
    )
    pairs = [(ours[i], theirs[i]) for ours, theirs in zip(found["shared"], found["one_by_one"]) for i in instances]
    return {
        "instances": len(instances),
        "seconds": {name: report.summary(values) for name, values in seconds.items()},
        "speedup": report.ratio(seconds["one_by_one"], seconds["shared"]),
        "passes": passes(model, instances, setting.image_size),
        "compile_seconds": {"one_by_one": compile_one_by_one, "shared": compile_shared},
        "differs": max(difference(ours, theirs) for ours, theirs in pairs),
        "memory_peak": memory,
    }


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        PRESETS,
        batches=(int, "to re-estimate from, and to evaluate on"),
        instances=(int, "spread over the net; 0 for all"),
    )
    results = {}
    for setting in Setting.parse_list(options.nets):
        results[str(setting)] = measure(setting, options)
        report.write(options.json, options, nets=results)
    print(report.heading())
    print(
        f"{'net':24}{'instances':>10}{'one by one, s':>24}{'shared, s':>24}{'speedup':>22}{'passes':>14}{'differs':>10}"
    )
    for net, row in results.items():
        seconds = "".join(f"{report.show(row['seconds'][name]):>24}" for name in ("one_by_one", "shared"))
        ways = f"{row['passes']['one_by_one']:.1f} to {row['passes']['shared']:.1f}"
        print(
            f"{net:24}{row['instances']:>10}{seconds}{report.show(row['speedup']):>22}{ways:>14}{row['differs']:>10.0e}"
        )
        compiling = row["compile_seconds"]
        print(f"  compiling: one by one {compiling['one_by_one']:.1f} s, shared {compiling['shared']:.1f} s")


if __name__ == "__main__":
    main()
