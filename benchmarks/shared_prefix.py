"""Training steps of several instances that share their prefixes, against the same instances one by one.

    python benchmarks/shared_prefix.py --net=resnet20:32:128 --json=shared_prefix.json

For sets of full resolution, the cheapest instance and one more, of which some are taken evenly over the net: the time
of forward and backward of the set over the sum of those of its instances, beside the share that its MACs are of theirs;
and the memory that the compiled programs ask for, the largest of one instance beside that of the set.
"""

import functools

import jax
import numpy as np
from common import report

from sdpoint_jax.instance import FULL_RESOLUTION, list_sets, set_name
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.profiling.macs import count_macs, count_set_macs
from sdpoint_jax.programs.devices import compiler_options, replicate, shard
from sdpoint_jax.training import step as steps
from sdpoint_jax.training.objective import Distillation
from sdpoint_jax.training.optimizer import SGD

PRESETS = {
    "small": dict(net="resnet20:32:128", dtype="float32", sets=3, rounds=3, steps=2, distillation=0.0),
    "cpu": dict(net="resnet20:32:128", dtype="float32", sets=5, rounds=7, steps=3, distillation=0.0),
    "gpu": dict(net="resnet50:224:128", dtype="bfloat16", sets=5, rounds=7, steps=10, distillation=0.0),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Gradients:
    """Forward and backward of sets of instances, on one batch that is on the devices already."""

    def __init__(self, model, size: int, batch_size: int, distillation: float):
        """Compiles nothing yet; `distillation` is the weight of soft targets, 0 for none."""
        rng, shape = np.random.default_rng(0), (batch_size, size, size, 3)
        labels = rng.integers(0, model.num_classes, batch_size).astype(np.int32)
        batch = {"images": rng.integers(0, 256, shape, np.uint8), "labels": labels}
        self._settings = dict(model=model, preprocess=functools.partial(normalize, mean=MEAN, std=STD))
        if distillation:
            self._settings["distillation"] = Distillation(distillation)
        state = steps.create_state(model, SGD(0.9, False, 1e-4), 0, (size, size, 3))
        self._args = replicate(state.params), steps.Control(0).shard(), shard(batch)
        self._programs = {}

    def compile(self, instances: tuple) -> jax.stages.Compiled:
        """Compiles the program of a set, once."""
        if instances not in self._programs:
            distillation = self._settings.get("distillation") if len(instances) > 1 else None
            settings = self._settings | {"distillation": distillation}
            step = functools.partial(steps.gradient_step, instances=instances, **settings)
            mapped = jax.pmap(step, steps.AXIS, in_axes=(None, 0, 0), out_axes=(None, None))
            self._programs[instances] = mapped.lower(*self._args).compile(compiler_options())
        return self._programs[instances]

    def seconds(self, sets: list[tuple], count: int, clock: str) -> float:
        """Mean time of `count` rounds of the sets, one after the other."""
        now, programs = report.CLOCKS[clock], [self.compile(instances) for instances in sets]
        start = now()
        for _ in range(count):
            for program in programs:
                jax.block_until_ready(program(*self._args))
        return (now() - start) / count

    def memory(self, instances: tuple) -> int | None:
        """Bytes that the program of a set needs besides its arguments; None where it is not known."""
        analysis = self.compile(instances).memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def measure(options) -> dict:
    """By set: times, their ratio, the share of MACs and the memory."""
    name, size, batch_size = options.net.split(":")
    size = int(size)
    model = create_model(name, 1000 if size >= 64 else 10, dtype=options.dtype)
    macs = {instance: count_macs(model, instance, size) for instance in model.instances()}
    always = FULL_RESOLUTION, min(macs, key=macs.get)
    ours = Gradients(model, size, int(batch_size), options.distillation)
    results = {}
    for instances in report.spread(list_sets(model.instances(), 3, always), options.sets):
        alone = [(instance,) for instance in instances]
        runs = {
            "together": functools.partial(ours.seconds, [instances], options.steps, options.clock),
            "apart": functools.partial(ours.seconds, alone, options.steps, options.clock),
        }
        seconds = report.take_turns(runs, options.rounds)
        share = count_set_macs(model, instances, size) / sum(macs[instance] for instance in instances)
        ratio = report.ratio(seconds["together"], seconds["apart"])
        results[set_name(instances)] = {
            "seconds": {name: report.summary(values) for name, values in seconds.items()},
            "time_ratio": ratio,
            "mac_ratio": share,
            "time_over_mac_ratio": ratio["median"] / share,
            "memory": {"together": ours.memory(instances), "apart": max(map(ours.memory, alone), default=None)},
        }
    return results


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        PRESETS,
        sets=(int, "sets to measure"),
        distillation=(float, "weight of soft targets of full resolution; 0 for none"),
    )
    results = measure(options)
    report.write(options.json, options, sets=results)
    print(report.heading())
    print(f"{'set':36}{'together, ms':>20}{'apart, ms':>20}{'ratio':>20}{'MACs':>8}{'time/MACs':>10}{'MiB':>12}")
    for name, row in results.items():
        times = [{k: v * (1000 if k != "n" else 1) for k, v in t.items()} for t in row["seconds"].values()]
        memory = "/".join("?" if bytes is None else f"{bytes / 2**20:.0f}" for bytes in row["memory"].values())
        print(
            f"{name:36}{report.show(times[0]):>20}{report.show(times[1]):>20}{report.show(row['time_ratio']):>20}"
            f"{row['mac_ratio']:>8.3f}{row['time_over_mac_ratio']:>10.3f}{memory:>12}"
        )


if __name__ == "__main__":
    main()
