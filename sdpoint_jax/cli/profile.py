"""Times the instances of an artefact on the device at hand: python -m sdpoint_jax profile runs/digits/sweep/artefact

Latency is the time of one call, from a batch of uint8 images in the host's memory to their logits there. For each
instance and batch size, the program is compiled, then timed in turns with all others. Median and 95th percentile,
memory, and seconds of compiling go into the artefact's table, beside those of other devices. Of XLA and onnxruntime
(pip install 'sdpoint_jax[onnx]'), predictors use the one that is found to be the faster for an instance and batch size.
Where the artefact lies in the folder of a sweep, sweep.csv and sweep.json are written again, and latency.png: accuracy
against latency, and the time that an instance saves beside the MACs that it saves. The same command goes on with a
profile that was interrupted.
Exit codes: 0 done, 2 error.
"""

import argparse
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdpoint_jax.cli.parser import add_model_flag, comma_separated
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance

if TYPE_CHECKING:
    from sdpoint_jax.profiling.latency import Effort, Program, Runtime
    from sdpoint_jax.storage.artefact import Artefact, InstanceRow, Latency

_BATCH_SIZES = "1,8,32"
_SERVED_BATCH_SIZES = (1, 4, 16)
_LIBRARIES = {"xla": ("jax", "jaxlib", "numpy", "sdpoint_jax"), "onnxruntime": ("onnxruntime", "numpy", "sdpoint_jax")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    add_model_flag(parser)
    parser.add_argument("--batch-sizes", default=_BATCH_SIZES, help=f"images of one call; {_BATCH_SIZES} by default")
    parser.add_argument(
        "--instances",
        default="all",
        help="all; pareto: those that no other one beats in MACs and accuracy; or names, as p03_r0.50,p05_r0.75. "
        "Full resolution is measured in any case, to compare with",
    )
    parser.add_argument(
        "--runtime",
        default="all",
        help="xla, onnxruntime, or all: those that are installed and do for this net and device; all by default",
    )
    parser.add_argument("--repeats", type=int, default=100, help="timed calls of each program; 100 by default")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for slow programs: timed seconds after which fewer calls will do"
    )


def add_profile_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag by which another command ends with a profile."""
    parser.add_argument(
        "--profile",
        nargs="?",
        const=_BATCH_SIZES,
        metavar="BATCH SIZES",
        help=f"then time all instances on this device, at these batch sizes; {_BATCH_SIZES} by default",
    )


def run(args: argparse.Namespace) -> None:
    """Times what the flags ask for, writes the results and prints the table."""
    batch_sizes = parse_batch_sizes(args.batch_sizes, "batch-sizes")
    check_machine()
    from sdpoint_jax.profiling.latency import Effort  # Late: JAX takes seconds.

    effort = Effort(repeats=args.repeats, seconds=args.seconds)
    profile_artefact(args.artefact, batch_sizes, args.instances, effort, args.runtime, args.model)


def parse_batch_sizes(text: str, flag: str) -> tuple[int, ...]:
    """Splits the value of a flag into batch sizes, ascending.

    Raises:
        ValueError: there is none, or one that is no whole number from 1 on; names the flag.
    """
    sizes = comma_separated(text, int, flag)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--{flag}={text}: give batch sizes from 1 on, with commas between them")
    return tuple(sorted(set(sizes)))


def check_machine() -> None:
    """Warns if the machine is busy; call it before anything heavy.

    Raises:
        ValueError: this process is one of several, which would wait for it.
    """
    import jax

    from sdpoint_jax.profiling.latency import warn_of_load

    warn_of_load()
    if jax.process_count() > 1:
        raise ValueError("--profile: times one host; afterwards, run: python -m sdpoint_jax profile ARTEFACT")


def profile_artefact(
    path: str | os.PathLike,
    batch_sizes: Sequence[int],
    instances: str = "all",
    effort: "Effort | None" = None,
    runtime: str = "all",
    model: Any = None,
) -> None:
    """Times instances of an artefact, writes the latencies into its table and its sweep's files, and prints them.

    Args:
        path: of the artefact.
        batch_sizes: images of one call, each at least 1.
        instances: `all`, `pareto`, or names with commas between them.
        effort: how long to measure.
        runtime: `xla`, `onnxruntime`, or `all`: those of them that do.
        model: The artefact's net, where it is a user's own; see `artefact.load`.

    Raises:
        CheckpointError: there is no sound artefact at `path`.
        ValueError: an instance that was not swept, a runtime that does not do, or another process writes to the folder
            of the artefact.
        ImportError: a runtime that is not installed; names the extra.
        OSError: something could not be written; names the path.
    """
    from sdpoint_jax.evaluation import table
    from sdpoint_jax.profiling import latency
    from sdpoint_jax.serving.predictor import Predictor, describe_runtimes
    from sdpoint_jax.storage import artefact

    path = pathlib.Path(path)
    swept = artefact.load(path, model)
    wanted = _find_instances(swept, instances) | {FULL_RESOLUTION}  # To compare the others with.
    chosen = [row.instance for row in swept.rows if row.instance in wanted]
    runtimes = make_runtimes(swept, runtime)
    unfinished = artefact.unfinished_profile(path)
    profiled, beside = _measure_and_write(
        path, swept, chosen, runtimes, batch_sizes, effort or latency.Effort(), unfinished
    )
    print(table.format_latencies(profiled.rows, runtimes[0].device))
    print(f"a predictor uses {describe_runtimes(Predictor(profiled), chosen, batch_sizes)}")
    print(f"written: the table of {path}{beside}")


def _measure_and_write(path, swept, chosen, runtimes, batch_sizes, effort, unfinished) -> "tuple[Artefact, str]":
    """Measure instances and write the latencies; return the artefact with them, and what else was written."""
    from sdpoint_jax.evaluation import sweep, table
    from sdpoint_jax.storage import artefact
    from sdpoint_jax.storage.lock import FolderLock

    files = path.with_name(table.TABLE)
    in_sweep = path.name == artefact.ARTEFACT and files.is_file()
    with FolderLock(path.parent, "folder"):
        _, baseline = table.read_table(files) if in_sweep else (None, None)
        profiled = _measure(swept, chosen, runtimes, batch_sizes, effort, unfinished)
        if in_sweep:
            sweep.write_results(profiled, path.parent, baseline, runtimes[0].device)
        else:
            artefact.save(profiled, path)
        unfinished.unlink(missing_ok=True)
    return profiled, ", and sweep.csv, sweep.json, latency.png beside it" if in_sweep else ""


def _measure(swept, chosen, runtimes, batch_sizes, effort, unfinished) -> "Artefact":
    from sdpoint_jax.profiling import latency

    found = latency.profile(runtimes, chosen, batch_sizes, effort, unfinished=unfinished, of=_checksum(swept))
    return swept.with_rows([_with_latencies(row, found.get(row.instance, ())) for row in swept.rows])


def measure_missing(
    swept: "Artefact",
    path: str | os.PathLike,
    instances: str,
    batch_sizes: Sequence[int],
    *,
    runtime: str,
    say: Callable[[str], object],
) -> "Artefact":
    """Measure the latencies that a service needs on this device and that the artefact lacks.

    A quick profile: 30 calls of each program. The service needs all its programs anyway, and finds them in the cache.
    The latencies are written into the artefact's table. If its folder cannot be written to, they are only returned.

    Args:
        swept: the artefact.
        path: of the artefact.
        instances: `all`, `pareto` or names with commas between them. Where any instance was measured on this device,
            `pareto` is chosen by these latencies later, and lacks nothing.
        batch_sizes: that are served; none for those that were measured, or else for 1, 4 and 16.
        runtime: see `Predictor`.
        say: called with lines for the user.

    Returns:
        the artefact with all latencies.

    Raises:
        ValueError: an instance that was not swept, or another process writes to the folder of the artefact.
        ImportError: a runtime that is not installed; names the extra.
    """
    from sdpoint_jax.choice.selection import list_batch_sizes, list_latencies
    from sdpoint_jax.profiling import latency
    from sdpoint_jax.storage.device import describe_device

    path, device = pathlib.Path(path), describe_device()
    setting = (device, None if runtime == "auto" else runtime, swept.dtype)
    sizes = tuple(batch_sizes) or tuple(list_batch_sizes(swept.rows, setting)) or _SERVED_BATCH_SIZES
    measured = {row.instance for row in swept.rows if list_latencies(row, setting).keys() >= set(sizes)}
    wanted = _find_instances(swept, instances) - measured
    if not wanted or (instances == "pareto" and measured):
        return swept
    runtimes = make_runtimes(swept, "all" if runtime == "auto" else runtime)
    missing = [row.instance for row in swept.rows if row.instance in wanted]
    count, listed = f"{len(missing)} of {len(swept.rows)} instances", ", ".join(map(str, sizes))
    say(f"not measured yet on {device}: {count} at batch sizes {listed}; measuring them first")
    effort, start = latency.Effort(repeats=30, seconds=0.5, rounds=10), time.monotonic()
    # Not the unfinished file of `profile`: what an interrupted one has measured in hours would be lost.
    with tempfile.TemporaryDirectory() as folder:
        arguments = swept, missing, runtimes, sizes, effort, pathlib.Path(folder) / "profiling.json"
        if os.access(path.parent, os.W_OK) and os.access(path.resolve().parent, os.W_OK):
            profiled, _ = _measure_and_write(path, *arguments)
            where = f"written into the table of {path}"
        else:
            profiled = _measure(*arguments)
            where = f"not kept, as {path.resolve().parent} cannot be written to"
    say(f"measured in {time.monotonic() - start:.0f} s; {where}")
    return profiled


def _find_instances(swept: "Artefact", names: str) -> set[SDPointInstance]:
    """Find the instances that `all`, `pareto` or names with commas between them mean."""
    from sdpoint_jax.evaluation.table import pareto_front

    if names == "all":
        wanted = {row.instance for row in swept.rows}
    elif names == "pareto":
        wanted = {row.instance for row in pareto_front(swept.rows)}
    else:
        wanted = {swept.row(SDPointInstance.from_name(name.strip())).instance for name in names.split(",")}
    return wanted


def _checksum(swept: "Artefact") -> list:
    """Tells the net of an artefact from others; its table does not count."""
    from sdpoint_jax.storage.checkpoint import checksum_tree

    statistics = {instance.name: tree for instance, tree in swept.batch_stats.items()}
    return [swept.model, checksum_tree({"params": swept.params, "batch_stats": statistics})]


def make_runtimes(swept: "Artefact", wanted: str) -> "list[Runtime]":
    """Makes runtimes of an artefact, each of a predictor on one device; its `predict` is what is timed.

    Args:
        swept: the artefact.
        wanted: `xla`, `onnxruntime`, or `all`: those of them that do.

    Raises:
        ValueError: an unknown runtime, or one that does not do for this artefact and device.
        ImportError: one that is not installed; names the extra.
    """
    import jax

    from sdpoint_jax.profiling import latency
    from sdpoint_jax.serving.predictor import Predictor
    from sdpoint_jax.storage.device import describe_device

    if wanted not in ("all", *_LIBRARIES):
        raise ValueError(f"--runtime={wanted}: valid are all, {', '.join(_LIBRARIES)}")
    devices = jax.local_devices()[:1]
    names = Predictor(swept, devices=devices).runtimes if wanted == "all" else [wanted]
    prepare = {"xla": _prepare_program, "onnxruntime": _open_session}
    return [
        latency.Runtime(
            name,
            describe_device(devices[0]),
            swept.dtype,
            swept.image_shape,
            latency.list_versions(_LIBRARIES[name]),
            functools.partial(prepare[name], Predictor(swept, runtime=name, devices=devices)),
        )
        for name in names
    ]


def _prepare_program(predictor, instance, batch_size) -> "Program":
    from sdpoint_jax.profiling import latency
    from sdpoint_jax.profiling.memory import planned_memory
    from sdpoint_jax.programs.devices import compiler_options

    compiler_options()  # The first time, it compiles, to ask XLA which options it knows: no part of any program's time.
    compile_it = functools.partial(predictor.compile, [instance], [batch_size], workers=1)
    seconds = latency.time_compilation(compile_it)
    memory = planned_memory(predictor.programs[instance, batch_size])
    return latency.Program(functools.partial(predictor.predict, instance=instance), memory, seconds)


def _open_session(predictor, instance, batch_size) -> "Program":
    from sdpoint_jax.profiling import latency

    is_new, start = instance not in predictor.sessions, time.perf_counter()
    predictor.compile([instance], [batch_size])  # One session for all batch sizes.
    seconds = round(time.perf_counter() - start, 3) if is_new else None
    return latency.Program(functools.partial(predictor.predict, instance=instance), None, seconds)


def _with_latencies(row: "InstanceRow", latencies: "Sequence[Latency]") -> "InstanceRow":
    for latency in latencies:
        row = row.with_latency(latency)
    return row
