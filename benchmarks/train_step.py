"""Training: images per second against PyTorch, and whether a cheaper instance is faster by what it saves.

    python benchmarks/train_step.py --nets=preresnet50:224:16 --json=train_step.json

For full resolution, an instance at the middle of the net and the earliest, each beside its peers in the same run.
`--draw` further times instances at that many points, spread over the net, and compares their mean step time over the
paper's draw with their mean MACs, both over full resolution. Inputs lie on the device already; ours normalises them
there from uint8.
"""

import functools
import os

from common import report
from common.peer import start_peers
from common.workload import Setting, Training, sample_instances

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.profiling.macs import count_macs

PRESETS = {
    "small": {"nets": "resnet20:32:128"},
    "cpu": {"nets": "preresnet50:224:16,resnet20:32:128", "rounds": 5},
    # Images whose last maps have 1 to 4 cells a side, which have convolutions of their own on a CPU.
    "small-images": {"nets": "resnet18:64:64,resnet18:96:64,resnet18:112:64"},
    "gpu": {
        "nets": "preresnet101:224:256,resnet50:224:256",
        "dtype": "bfloat16",
        "peers": "eager,tuned",
        "rounds": 5,
        "steps": 10,
        "draw": 35,
    },
}
DEFAULTS = {"dtype": "float32", "peers": "eager", "tuned_instances": 1, "rounds": 3, "steps": 2, "draw": 0}


def against_peers(ours, peers: dict, setting: Setting, options) -> dict:
    """Measures, by instance, images/s of each workload, and the ratio of ours to each peer."""
    results = {}
    for number, instance in enumerate(sample_instances(setting.model())):
        workloads = {"ours": ours} | {
            name: peer for name, peer in peers.items() if name != "tuned" or number < options.tuned_instances
        }
        runs = {
            name: functools.partial(workload.seconds_per_step, [instance] * options.steps, options.clock)
            for name, workload in workloads.items()
        }
        rates = {
            name: [setting.batch_size / value for value in values]
            for name, values in report.take_turns(runs, options.rounds).items()
        }
        results[instance.name] = {
            "images_per_second": {name: report.summary(values) for name, values in rates.items()},
            "over": {name: report.ratio(rates["ours"], rates[name]) for name in rates if name != "ours"},
        }
    return results


def mean_over_draw(values: dict) -> float:
    """Averages under the paper's draw: uniform over points, then over the ratios at a point."""
    by_point = {}
    for instance, value in values.items():
        by_point.setdefault(instance.point, []).append(value)
    return sum(sum(group) / len(group) for group in by_point.values()) / len(by_point)


def over_the_draw(ours, setting: Setting, options) -> dict:
    """Measures mean step time and mean MACs of the draw, both over full resolution."""
    model = setting.model()
    points = dict.fromkeys(instance.point for instance in model.instances())
    instances = model.instances(points=report.spread(list(points), options.draw))
    for _ in ours.programs.compile(instances, os.cpu_count()):
        pass
    runs = {
        instance: functools.partial(ours.seconds_per_step, [instance] * options.steps, options.clock)
        for instance in instances
    }
    seconds = report.take_turns(runs, options.rounds)
    macs = {instance: count_macs(model, instance, setting.image_size) for instance in instances}
    times = [mean_over_draw(dict(zip(seconds, column))) for column in zip(*seconds.values())]
    time_ratio = report.ratio(times, seconds[FULL_RESOLUTION])
    mac_ratio = mean_over_draw(macs) / macs[FULL_RESOLUTION]
    return {
        "points": len({instance.point for instance in instances}),
        "time_ratio": time_ratio,
        "mac_ratio": mac_ratio,
        "time_over_mac_ratio": time_ratio["median"] / mac_ratio,
        "seconds": {instance.name: report.summary(values) for instance, values in seconds.items()},
        "gmacs": {instance.name: value / 1e9 for instance, value in macs.items()},
    }


def measure(setting: Setting, options) -> dict:
    """Measures training steps of one net: beside its peers, over the draw, and the peak of memory."""
    ours = Training(setting, options.dtype)
    memory = {}
    ours.step(FULL_RESOLUTION)
    ours.wait()
    memory["full"] = report.memory_peak()
    with start_peers(options.peers, "Training", setting) as peers:
        result = {"instances": against_peers(ours, peers, setting, options)}
    if options.draw:
        result["draw"] = over_the_draw(ours, setting, options)
    memory["all"] = report.memory_peak()
    return result | {"memory_peak": memory}


def table(results: dict, what: str) -> None:
    """Prints one line for each instance: images/s of each workload, and our ratio to each peer."""
    print(f"{what:32}{'':10}{'images/s':>26}{'ours over it':>24}")
    for net, result in results.items():
        for name, row in result["instances"].items():
            for workload, rate in row["images_per_second"].items():
                over = report.show(row["over"][workload]) if workload in row["over"] else ""
                print(f"{net + ' ' + name:32}{workload:10}{report.show(rate):>26}{over:>24}")


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        {name: DEFAULTS | preset for name, preset in PRESETS.items()},
        tuned_instances=(int, "of the three, those that tuned PyTorch runs: it compiles a deep net for a minute each"),
        draw=(int, "points of the draw; 0 for no such comparison"),
    )
    results = {}
    for setting in Setting.parse_list(options.nets):
        results[str(setting)] = measure(setting, options)
        report.write(options.json, options, nets=results)
    print(report.heading())
    table(results, "training")
    for net, result in results.items():
        if draw := result.get("draw"):
            print(
                f"{net}, mean of the draw over full resolution, {draw['points']} points: time "
                f"{report.show(draw['time_ratio'])}, MACs {draw['mac_ratio']:.3g}: {draw['time_over_mac_ratio']:.3f}"
            )
        if full := result["memory_peak"]["full"]:
            peak = result["memory_peak"]["all"]
            print(f"{net}, memory peak: full resolution {full / 2**30:.2f} GiB, all {peak / full:.3f} of it")


if __name__ == "__main__":
    main()
