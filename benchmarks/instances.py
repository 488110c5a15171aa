"""Every instance of a network: its time over full resolution beside its MACs, in training and in inference.

    NPROC=1 python benchmarks/instances.py --clock=cpu --nets=resnet18:64:16,resnet18:96:16 --json=instances.json

An instance that saves MACs and no time shows here, such as one whose small maps the backend computes by a slow form.
Prints one line for each instance and network, and the worst ratio of time to MACs of each network.
"""

import functools
import os

from common import report
from common.workload import Inference, Setting, Training

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.profiling.macs import count_macs

PRESETS = {
    "small": {"nets": "resnet18:64:16"},
    "cpu": {"nets": ",".join(f"resnet18:{size}:16" for size in (64, 96, 112, 160, 224))},
}
DEFAULTS = {"dtype": "float32", "rounds": 3, "steps": 1}


def over_full_resolution(workload, setting: Setting, options) -> dict:
    """Measure the step time of every instance, by name, and its ratio to full resolution."""
    runs = {
        instance: functools.partial(workload.seconds_per_step, [instance] * options.steps, options.clock)
        for instance in setting.model().instances()
    }
    seconds = report.take_turns(runs, options.rounds)
    return {
        instance.name: {
            "seconds": report.summary(values),
            "over_full": report.ratio(values, seconds[FULL_RESOLUTION]),
        }
        for instance, values in seconds.items()
    }


def measure(setting: Setting, options) -> dict:
    """Measure one network: by instance, MACs over full resolution, and the times of both workloads."""
    model = setting.model()
    macs = {instance.name: count_macs(model, instance, setting.image_size) for instance in model.instances()}
    training = Training(setting, options.dtype)
    for _ in training.programs.compile(model.instances(), os.cpu_count()):
        pass
    times = {
        "training": over_full_resolution(training, setting, options),
        "inference": over_full_resolution(Inference(setting, options.dtype), setting, options),
    }
    return {
        name: {"macs": value / macs[FULL_RESOLUTION.name], **{kind: times[kind][name] for kind in times}}
        for name, value in macs.items()
    }


def main():
    """Measure, print the table, and write the results where the flags say so."""
    options = report.parse(__doc__, {name: DEFAULTS | preset for name, preset in PRESETS.items()})
    results = {}
    for setting in Setting.parse_list(options.nets):
        results[str(setting)] = measure(setting, options)
        report.write(options.json, options, nets=results)
    print(report.heading())
    print(f"{'time over full resolution':32}{'MACs':>8}{'training':>22}{'inference':>22}")
    for net, rows in results.items():
        for name, row in rows.items():
            times = "".join(f"{report.show(row[kind]['over_full']):>22}" for kind in ("training", "inference"))
            print(f"{net + ' ' + name:32}{row['macs']:8.3f}{times}")
        for kind in ("training", "inference"):
            worst = max(rows, key=lambda name: rows[name][kind]["over_full"]["median"] / rows[name]["macs"])
            ratio = rows[worst][kind]["over_full"]["median"] / rows[worst]["macs"]
            print(f"{net}, {kind}: at most {ratio:.2f} times its MACs, at {worst}")


if __name__ == "__main__":
    main()
