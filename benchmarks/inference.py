"""Inference: latency and throughput against PyTorch, and whether latency follows the MACs.

    python benchmarks/inference.py --nets=preresnet50:224:16 --json=inference.json

Throughput at the batch size of `--nets`, latency at `--latency-batch`; for full resolution, an instance at the middle
of the net and the earliest, each beside its peers in the same run. The last lines compare time at the larger batch
with MACs, both over full resolution.

    python benchmarks/inference.py --preset=runtimes

times full resolution alone: whole calls of `Predictor.predict` in the runtime that it picks, after a profile of both,
beside a bare session of onnxruntime and PyTorch. Each call is from uint8 images to logits, both in the host's memory,
but for PyTorch, whose images are normalised already.
"""

import functools
import pathlib
import tempfile

from common import report
from common.peer import start_peers
from common.workload import Inference, Setting, Workload, drawn_artefact, random_batch, sample_instances
from train_step import against_peers, table

from sdpoint_jax.cli.profile import make_runtimes
from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.profiling.latency import Effort, profile
from sdpoint_jax.profiling.macs import count_macs
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage.device import count_threads

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
    "runtimes": {
        "nets": "resnet20:32:1,resnet20:32:32,preresnet50:224:1,preresnet50:224:32",
        "rounds": 15,
        "steps": 0,
        "runtimes": True,
    },
}
DEFAULTS = {
    "runtimes": False,
    "dtype": "float32",
    "peers": "eager",
    "tuned_instances": 3,
    "latency_batch": 1,
    "rounds": 3,
}


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


class Calls(Workload):
    """Calls of a function on one batch of uint8 images; each returns when its logits are in the host's memory."""

    def __init__(self, call, setting: Setting):
        self._call, self._images = call, random_batch(setting)["images"]

    def step(self, instance) -> None:
        self._call(self._images)

    def wait(self) -> None:
        pass


def profiled_predictor(setting: Setting) -> Predictor:
    """Makes a predictor with full resolution profiled in both runtimes, and prepared for the batch."""
    swept = drawn_artefact(setting)
    with tempfile.TemporaryDirectory() as folder:
        file, effort = pathlib.Path(folder, "unfinished"), Effort(repeats=30, seconds=2, rounds=5)
        runtimes = make_runtimes(swept, "all")
        found = profile(runtimes, [FULL_RESOLUTION], [setting.batch_size], effort, unfinished=file, of="drawn")
    row = swept.row(FULL_RESOLUTION)
    for latency in found[FULL_RESOLUTION]:
        row = row.with_latency(latency)
    predictor = Predictor(swept.with_rows([row]))
    predictor.compile([FULL_RESOLUTION], [setting.batch_size])
    return predictor


def bare_session(setting: Setting):
    """Makes a function of a session of onnxruntime with default options but for the threads: images to logits."""
    import onnxruntime

    from sdpoint_jax.interop.onnx_graph import build_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count_threads()
    model = build_model(drawn_artefact(setting), FULL_RESOLUTION).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def between_runtimes(setting: Setting, options) -> dict:
    """Measures milliseconds of a call: the predictor, a bare session, PyTorch; and the predictor's over the others."""
    predictor = profiled_predictor(setting)
    predict = functools.partial(predictor.predict, instance=FULL_RESOLUTION)
    with start_peers(options.peers, "Inference", setting) as peers:
        calls = {"predictor": Calls(predict, setting), "session": Calls(bare_session(setting), setting), **peers}
        once = {name: calls[name].seconds_per_step([FULL_RESOLUTION] * 2) for name in calls}
        steps = options.steps or max(1, round(0.25 / once["predictor"]))
        runs = {
            name: functools.partial(call.seconds_per_step, [FULL_RESOLUTION] * steps, options.clock)
            for name, call in calls.items()
        }
        seconds = report.take_turns(runs, options.rounds)
    return {
        "runtime": predictor.runtime_of(FULL_RESOLUTION, setting.batch_size),
        "calls_per_round": steps,
        "ms": {name: report.summary([1e3 * value for value in values]) for name, values in seconds.items()},
        "over": {name: report.ratio(seconds["predictor"], seconds[name]) for name in runs if name != "predictor"},
    }


def main_of_runtimes(options) -> None:
    """Measures and prints the comparison of runtimes."""
    results = {}
    for setting in Setting.parse_list(options.nets):
        results[str(setting)] = between_runtimes(setting, options)
        report.write(options.json, options, nets=results)
    print(report.heading())
    print(f"{'':24}{'':12}{'ms of a batch':>28}{'predictor over it':>28}")
    for net, result in results.items():
        for name, stats in result["ms"].items():
            over = report.show(result["over"][name]) if name in result["over"] else f"in {result['runtime']}"
            print(f"{net:24}{name:12}{report.show(stats):>28}{over:>28}")


def measure(setting: Setting, options, macs: bool) -> dict:
    """Measures inference of one net beside its peers and, if `macs`, its time beside its MACs."""
    ours = Inference(setting, options.dtype)
    with start_peers(options.peers, "Inference", setting) as peers:
        result = {"instances": against_peers(ours, peers, setting, options)}
    if macs:
        result["macs"] = against_macs(ours, setting, options)
    return result | {"memory_peak": report.memory_peak()}


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        {name: DEFAULTS | preset for name, preset in PRESETS.items()},
        tuned_instances=(int, "of the three, those that tuned PyTorch runs"),
        latency_batch=(int, "batch size of the latency"),
        runtimes=(report.switch, "yes: compare the runtimes, no: the instances"),
    )
    if options.runtimes:
        main_of_runtimes(options)
        return
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
