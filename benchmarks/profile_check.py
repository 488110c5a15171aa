"""The latency of `profile` against a bare loop around the compiled program, and against a second profile.

    python benchmarks/profile_check.py --nets=resnet20:32:1,resnet20:32:8 --json=profile_check.json

Two measurements by `profiling/latency.py` and the bare loop take turns at each instance, so that another program on the
machine slows all three alike. `--clock=cpu` counts the seconds of all threads of this process instead.
"""

import functools
import statistics

import numpy as np
from common import report
from common.workload import Setting, drawn_artefact, random_batch

from sdpoint_jax.profiling.latency import Effort, measure, summarize
from sdpoint_jax.serving.predictor import Predictor

PRESETS = {"small": dict(nets="resnet20:32:1,resnet20:32:8,resnet20:32:32", dtype="float32", repeats=100)}


def bare_loop(program, images, calls, clock):
    """Seconds of each of `calls` calls."""
    np.asarray(program(images))
    seconds = []
    for _ in range(calls):
        start = clock()
        np.asarray(program(images))
        seconds.append(clock() - start)
    return seconds


def check(setting, options):
    """By instance: milliseconds of both profiles and of the bare loop, and the ratios of the first to the others."""
    predictor, images = Predictor(drawn_artefact(setting, options.dtype)), random_batch(setting)["images"]
    predictor.compile(predictor.instances, [setting.batch_size])
    targets = {i: functools.partial(predictor.predict, images, instance=i) for i in predictor.instances}
    effort, clock = Effort(repeats=options.repeats, seconds=1e9), report.CLOCKS[options.clock]
    first, second, bare = {}, {}, {instance: [] for instance in targets}
    turns = (measure(targets, effort, found, clock=clock) for found in (first, second))
    for instance, _ in zip(*turns):
        program, calls = predictor.program(instance, setting.batch_size), len(first[instance][-1])
        bare[instance].append(bare_loop(program, images, calls, clock))
    rows = {}
    for instance in targets:
        one, two, loop = (summarize(found[instance])[0] for found in (first, second, bare))
        rows[instance.name] = {"profile": one, "again": two, "loop": loop, "to_again": one / two, "to_loop": one / loop}
    return rows


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(__doc__, PRESETS, repeats=(int, "timed calls of each program"))
    results = {str(setting): check(setting, options) for setting in Setting.parse_list(options.nets)}
    report.write(options.json, options, nets=results)
    print(report.heading())
    for net, rows in results.items():
        for name, row in rows.items():
            times = " ".join(f"{row[key]:>9.3f}" for key in ("profile", "again", "loop"))
            print(f"{net:<16} {name:<10} {times} ms   {row['to_again']:.3f} {row['to_loop']:.3f}")
        again, loop = ([row[key] for row in rows.values()] for key in ("to_again", "to_loop"))
        print(f"{net:<16} over a second profile {describe(again)}, over a bare loop {describe(loop)}")


def describe(ratios):
    """Median and extremes."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}, {len(ratios)} instances)"


if __name__ == "__main__":
    main()
