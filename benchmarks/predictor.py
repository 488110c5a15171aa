"""What a predictor costs beside its programs: switching the instance at every call, and starting a process again.

    python benchmarks/predictor.py --nets=resnet20:32:1,resnet20:32:32 --json=predictor.json

*Switching*: calls that go round over eight instances, against calls that stay at each instance as long. *Starting*:
the time from the start of a process to the answer to its first call, with eight instances compiled at batch sizes 1, 8
and 32; at first with no kept programs, then with those that the first process has left.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from common import report
from common.workload import Setting, drawn_artefact, random_batch

from sdpoint_jax.profiling.latency import time_compilation
from sdpoint_jax.programs.devices import compiler_options
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage import artefact

PRESETS = {"small": dict(nets="resnet20:32:1,resnet20:32:32", dtype="float32", runtime="xla", rounds=20, starts=5)}
INSTANCES, BATCH_SIZES = 8, (1, 8, 32)
CHILD = "--start-of="


def time_switching(setting, options):
    """Returns summaries of the milliseconds of a call, switching and staying, and of their ratio."""
    predictor = Predictor(drawn_artefact(setting, options.dtype), runtime=options.runtime)
    images = random_batch(setting)["images"]
    chosen = report.spread(predictor.instances, INSTANCES)
    predictor.compile(chosen, [setting.batch_size])

    def time_calls(order):
        start = time.perf_counter()
        for instance in order:
            predictor.predict(images, instance=instance)
        return 1000 * (time.perf_counter() - start) / len(order)

    orders = {"switching": chosen * len(chosen), "staying": sorted(chosen * len(chosen), key=chosen.index)}
    times = report.take_turns({name: functools.partial(time_calls, orders[name]) for name in orders}, options.rounds)
    summaries = {name: report.summary(values) for name, values in times.items()}
    return summaries | {"ratio": report.ratio(times["switching"], times["staying"])}


def time_starts(setting, options):
    """Returns the seconds of the first start, a summary of those of later ones, and what the last has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "artefact"
        artefact.save(drawn_artefact(setting, options.dtype), path)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"}
        seconds, compiled = [], ""
        for _ in range(options.starts + 1):
            start = time.perf_counter()
            command = [sys.executable, __file__, CHILD + str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
                compiled = process.stdout.readline().strip()
                seconds.append(time.perf_counter() - start)
            if process.returncode:
                raise RuntimeError(f"a start ended with code {process.returncode}")
    return {"first": seconds[0], "later": report.summary(seconds[1:]), "compiled": compiled}


def start(path):
    """Prints, once the first call is answered, whether anything was compiled for it."""
    predictor = Predictor.load(path)

    def first_call():
        predictor.compile(report.spread(predictor.instances, INSTANCES), BATCH_SIZES)
        predictor.predict(np.zeros((1, *predictor.image_shape), np.uint8), instance=predictor.instances[0])

    compiler_options()  # Compiles, to ask XLA which options it knows.
    print("nothing" if time_compilation(first_call) is None else "programs", flush=True)


def main():
    """Prints both tables."""
    options = report.parse(
        __doc__,
        PRESETS,
        runtime=(str, "xla or onnxruntime, for switching"),
        rounds=(int, "of each order of calls"),
        starts=(int, "of a process with kept programs"),
    )
    settings = Setting.parse_list(options.nets)
    switching = {str(setting): time_switching(setting, options) for setting in settings}
    by_net = {setting.name: setting for setting in settings}
    starts = {name: time_starts(setting, options) for name, setting in by_net.items()}
    report.write(options.json, options, switching=switching, starts=starts)
    print(report.heading())
    for net, row in switching.items():
        ways = ", ".join(f"{way} {report.show(row[way])} ms a call" for way in ("switching", "staying"))
        print(f"{net}: {ways}; ratio {report.show(row['ratio'], '.3f')}, n = {row['ratio']['n']}")
    for net, row in starts.items():
        later = f"later ones {report.show(row['later'])}, n = {row['later']['n']}"
        print(f"{net}: first start {row['first']:.3g} s, {later}; the last compiled {row['compiled']}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith(CHILD):
        start(sys.argv[1].removeprefix(CHILD))
    else:
        main()
