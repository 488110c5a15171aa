"""What switching costs: the same steps with another instance every time, against grouped by instance.

    python benchmarks/dispatch.py --json=dispatch.json

Then `--count-steps` steps of a tiny net under the paper's draw, with every trace and compilation counted: after the
first use of each instance there are none.
"""

import functools
import random

import jax
from common import report
from common.workload import Setting, Training

from sdpoint_jax.instance import sample_instance

PRESETS = {
    "small": dict(net="resnet20:32:128", dtype="float32", instances=4, rounds=5, steps=8, count_steps=2000),
    "cpu": dict(net="resnet20:32:128", dtype="float32", instances=6, rounds=7, steps=12, count_steps=2000),
    "gpu": dict(net="resnet50:224:256", dtype="bfloat16", instances=7, rounds=7, steps=70, count_steps=2000),
}
TINY = Setting("wrn10_1", 8, 4)


def switching(setting: Setting, options) -> dict:
    """Measures seconds per step of the same steps, in an order that switches every time, and grouped."""
    workload = Training(setting, options.dtype)
    chosen = report.spread(setting.model().instances(), options.instances)
    switched = chosen * (options.steps // len(chosen))
    grouped = sorted(switched, key=chosen.index)
    runs = {
        "switched": functools.partial(workload.seconds_per_step, switched, options.clock),
        "grouped": functools.partial(workload.seconds_per_step, grouped, options.clock),
    }
    seconds = report.take_turns(runs, options.rounds)
    return {name: report.summary(values) for name, values in seconds.items()} | {
        "switched_over_grouped": report.ratio(seconds["switched"], seconds["grouped"])
    }


class Counter:
    """Traces and compilations since its creation, as JAX announces them."""

    EVENTS = {
        "/jax/core/compile/jaxpr_trace_duration": "traces",
        "/jax/core/compile/backend_compile_duration": "compilations",
    }

    def __init__(self):
        self.counts = dict.fromkeys(self.EVENTS.values(), 0)
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event, duration, **_):
        if event in self.EVENTS:
            self.counts[self.EVENTS[event]] += 1


def count_compilations(steps: int) -> dict:
    """Counts traces and compilations in `steps` steps of a tiny net, before and after each instance was used once."""
    counter, workload, instances = Counter(), Training(TINY), TINY.model().instances()
    for instance in random.Random(0).sample(instances, len(instances)):
        workload.step(instance)
    workload.wait()
    warm_up = dict(counter.counts)
    seconds = workload.seconds_per_step([sample_instance(0, step, instances) for step in range(steps)])
    after = {name: counter.counts[name] - warm_up[name] for name in warm_up}
    return {
        "steps": steps,
        "instances": len(instances),
        "programs": len(workload.programs),
        "warm_up": warm_up,
        "after": after,
        "seconds_per_step": seconds,
    }


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        PRESETS,
        instances=(int, "to switch between"),
        count_steps=(int, "over which traces and compilations are counted"),
    )
    counted, times = count_compilations(options.count_steps), switching(Setting.parse(options.net), options)
    report.write(options.json, options, switching=times, compilations=counted)
    print(report.heading())
    print(f"{'net':24}{'switched, s/step':>30}{'grouped, s/step':>30}{'ratio':>30}")
    print(f"{options.net:24}" + "".join(f"{report.show(times[name], '.4g'):>30}" for name in times))
    print(
        f"{counted['steps']} steps, {counted['instances']} instances, {counted['programs']} programs: "
        f"{counted['after']['traces']} traces and {counted['after']['compilations']} compilations after warm-up "
        f"({counted['warm_up']['traces']} and {counted['warm_up']['compilations']} in it), "
        f"{1e3 * counted['seconds_per_step']:.2f} ms per step"
    )


if __name__ == "__main__":
    main()
