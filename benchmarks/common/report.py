"""What the benchmarks have in common: turns, medians, the machine, the file of results.

Measurements take turns, round by round, so that another program on the machine slows all alike; a ratio is the
median of the rounds' ratios, each of two neighbours in time.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from sdpoint_jax.programs.host_memory import keep_freed_memory

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "onnxruntime")
# Flags that several benchmarks have: a type and a help text each.
FLAGS = {
    "net": (str, "NAME:IMAGE SIZE:BATCH SIZE"),
    "nets": (str, "NAME:IMAGE SIZE:BATCH SIZE, ..."),
    "dtype": (str, "of our computation"),
    "peers": (str, "of eager, tuned; empty for none"),
    "rounds": (int, "measurements of each"),
    "steps": (int, "of one measurement"),
}


def parse(doc: str, presets: Mapping[str, dict], **flags) -> argparse.Namespace:
    """Parses the command line: `--json`, `--clock`, `--preset`, and a flag for each value of a preset.

    Also sets up the process's memory as `train.py` does.

    Args:
        doc: of the benchmark.
        presets: values of the flags; `small`, the default, is for a few minutes on a CPU.
        **flags: a type and a help text for each that is not in `FLAGS`.
    """
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time, for busy cores")
    parser.add_argument("--preset", choices=presets, default="small", help="values of the flags below")
    for name in presets["small"]:
        kind, text = flags[name] if name in flags else FLAGS[name]
        text += "; " + ", ".join(f"{preset}: {values[name]}" for preset, values in presets.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    chosen, _ = parser.parse_known_args()
    parser.set_defaults(**presets[chosen.preset])
    return parser.parse_args()


def switch(text: str) -> bool:
    """Parses a flag's value, yes or no."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: valid are yes and no")
    return text == "yes"


def spread(items: Sequence, count: int) -> tuple:
    """Picks `count` of the items, or all if there are fewer, evenly from the first to the last."""
    count = min(count, len(items))
    return tuple(items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count))


def take_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls every run once per round, back and forth; a first round warms up and does not count."""
    values = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 else reversed(runs):
            value = runs[name]()
            if number:
                values[name].append(value)
    return values


def summary(values: list[float]) -> dict[str, float]:
    """Returns median, extremes and number of values."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratio(values: list[float], others: list[float]) -> dict[str, float]:
    """Summarises the rounds' ratios."""
    return summary([a / b for a, b in zip(values, others, strict=True)])


def show(stats: Mapping[str, float], form: str = ".3g") -> str:
    """Formats a summary for a cell of a table."""
    return f"{stats['median']:{form}} ({stats['low']:{form}}-{stats['high']:{form}})"


def memory_peak() -> int | None:
    """Bytes of the first device's memory that were in use at most so far; None where the backend does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def write(path: str | None, options: argparse.Namespace, **results) -> None:
    """Writes the results, with machine, versions and settings; without a path, nothing."""
    if path:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        content = {"machine": machine(), "versions": versions(), "settings": settings, **results}
        pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")


def heading() -> str:
    """Returns the lines above a table."""
    device = jax.devices()[0]
    libraries = ", ".join(f"{name} {value}" for name, value in versions().items() if value)
    return f"\n{processor()}, {os.cpu_count()} cores; {device.device_kind} x {jax.device_count()}\n{libraries}"


def machine() -> dict:
    """Describes what results depend on beside the libraries; `load` is the mean count of processes, of a minute."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def processor() -> str:
    """Names the processor, or gives that of its architecture."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(libraries: Iterable[str] = LIBRARIES) -> dict:
    """Versions of Python and `libraries`."""
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def version(library: str) -> str | None:
    """Returns the installed version; None where there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
