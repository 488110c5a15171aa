"""Inference: latency and throughput against PyTorch, and whether latency follows the MACs.

    python benchmarks/inference.py --nets=preresnet50:224:16 --json=inference.json

Throughput at the batch size of `--nets`, latency at `--latency-batch`; for full resolution, an instance at the middle
of the net and the earliest, each beside its peers in the same run. The last lines compare time at the larger batch
with MACs, both over full resolution.
"""

import functools

from common import report
from common.peer import start_peers
from common.workload import Inference, Setting, sample_instances
from train_step import against_peers, table

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.profiling.macs import count_macs

PRESETS = {
    "small": {"nets": "resnet20:32:128", "steps": 3},
    "cpu": {"nets": "preresnet50:224:16,resnet20:32:128", "steps": 3, "rounds": 5},
    "gpu": {
        "nets": "preresnet101:224:128,resnet50:224:128",
        "dtype": "bfloat16",
        "peers": "eager,tuned",
        "rounds": 5,
        "steps": 20,
    },
}
DEFAULTS = {"dtype": "float32", "peers": "eager", "tuned_instances": 3, "latency_batch": 1, "rounds": 3}


def against_macs(ours: Inference, setting: Setting, options) -> dict:
    """Measures, by instance, time and MACs, both over full resolution."""
    model = setting.model()
    runs = {
        instance: functools.partial(ours.seconds_per_step, [instance] * options.steps, options.clock)
        for instance in sample_instances(model)
    }
    seconds = report.take_turns(runs, options.rounds)
    full_macs = count_macs(model, FULL_RESOLUTION, setting.image_size)
    results = {}
    for instance, values in seconds.items():
        time = report.ratio(values, seconds[FULL_RESOLUTION])
        macs = count_macs(model, instance, setting.image_size) / full_macs
        results[instance.name] = {"time_ratio": time, "mac_ratio": macs, "time_over_mac_ratio": time["median"] / macs}
    return results


def measure(setting: Setting, options, macs: bool) -> dict:
    """Measures inference of one net beside its peers and, if `macs`, its time beside its MACs."""
    ours = Inference(setting, options.dtype)
    with start_peers(options.peers, "Inference", setting) as peers:
        result = {"instances": against_peers(ours, peers, setting, options)}
    if macs:
        result["macs"] = against_macs(ours, setting, options)
    return result | {"memory_peak": report.memory_peak()}


def main():
    options = report.parse(
        __doc__,
        {name: DEFAULTS | preset for name, preset in PRESETS.items()},
        tuned_instances=(int, "of the three, those that tuned PyTorch runs"),
        latency_batch=(int, "batch size of the latency"),
    )
    results = {}
    for setting in Setting.parse_list(options.nets):
        small = setting._replace(batch_size=options.latency_batch)
        results[str(setting)] = measure(setting, options, macs=True)
        results[str(small)] = measure(small, options, macs=False)
        report.write(options.json, options, nets=results)
    print(report.heading())
    table(results, "inference")
    for net, result in results.items():
        for name, row in result.get("macs", {}).items():
            print(
                f"{net} {name} over full resolution: time {report.show(row['time_ratio'])}, "
                f"MACs {row['mac_ratio']:.3f}: {row['time_over_mac_ratio']:.3f}"
            )


if __name__ == "__main__":
    main()
