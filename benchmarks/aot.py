"""The project's programs for accelerators that are not here: do they compile, do they fit, what limits them?

    python benchmarks/aot.py --target=export:tpu --net=preresnet50:224:128        # seconds; needs nothing more
    python benchmarks/aot.py --target=tpu:v5e:2x2 --net=resnet50:224:128 --results=aot.jsonl
    python benchmarks/aot.py --target=gpu:h100:h100_sxm.txtpb:1x1x4 --net=resnet50:224:256

The batch size is that of one device. Targets:

    export:tpu, export:cuda   traces and lowers for one device of the platform, and compiles nothing
    tpu:TOPOLOGY              compiles for v4:2x2x1, v5p:2x2x1, v5e:2x2, v5e:4x4 (four hosts), v6e:2x2, ...; needs the
                              package libtpu beside the installed jax, as `pip install -e .[tpu]` brings it
    gpu:NAME:FILE:TOPOLOGY    compiles for the GPU that a target configuration of XLA describes, as those in its
                              repository under xla/backends/gpu/target_config/specs; needs `pip install -e .[cuda12]`
    cpu                       compiles for one CPU device, as JAX finds it here

Each program is compiled by itself, and its work is CPU-seconds of this process. `roofline` is the estimate of
`python -m sdpoint_jax cost --device` for the same program, `compiler` the sum of the cycles that the TPU compiler
expects of each instruction (without those of select-and-scatter and custom calls, which it does not estimate).
Percentages are of full resolution; `reestimate` and `evaluate`, of the layers after a point alone, have none. `pool` is
the downsampling of an instance by itself, forward and backward, on one device. `blocks` is what the gradients would be
if stem, blocks and head were programs of their own, of one device, and those alike were one: the work is that of the
different ones, cycles, bytes and operations are the sum over the net. Nothing runs on the target.

`--results` names a file that keeps a row of JSON for each program, with the versions that it was compiled by. What
has a row is not compiled again, so a run that was interrupted goes on from there; delete rows to compile anew. What is
counted from shapes is counted anew each time. The summary is of all rows of the file.

`--options` sets options of JAX, as in `jax_exec_time_optimization_effort=-0.5,jax_memory_fitting_effort=-1`, to see
what a compiler's work is worth; its rows stand beside those without.
"""

import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Compiling for an absent TPU: no search for one, and several processes may load its library.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import report
from common.workload import OPTIMIZER, SCHEDULE, Setting, preprocess
from jax.experimental import topologies

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.pool import adaptive_avg_pool, adaptive_max_pool
from sdpoint_jax.models.resnet import ResNet
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.profiling import roofline
from sdpoint_jax.profiling.macs import count_cost
from sdpoint_jax.profiling.parts import list_operations
from sdpoint_jax.programs.devices import Switch, device_count, on_device, shape_of_shards, shapes_of
from sdpoint_jax.programs.evaluator import Evaluator
from sdpoint_jax.programs.inference import InferencePrograms
from sdpoint_jax.storage import files
from sdpoint_jax.training.step import TrainPrograms, TrainState

DEFAULTS = dict(dtype="bfloat16", instances="3", results="", options="")
PRESETS = {
    "small": dict(target="export:tpu", net="resnet20:32:128", programs="all"),
    "tpu": dict(
        target="tpu:v5e:2x2", net="resnet50:224:128", programs="gradient", results="benchmarks/results/aot.jsonl"
    ),
}
PROGRAMS = ("gradient", "update", "reestimate", "evaluate", "inference", "pool", "blocks")
WHOLE = ("gradient", "update", "inference", "blocks")  # Of the whole net; the others are of the layers after a point.
KEYS = ("target", "net", "dtype", "options", "program", "instance")  # What tells rows apart.
SETTING = 4  # So many of them are the same for all programs of a run.
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
# Of TPUs: their peak rate over what their matrix units do in a cycle.
GIGAHERTZ = {"tpu-v4": 1.05, "tpu-v5e": 1.5, "tpu-v5p": 1.75}


class Place(NamedTuple):
    """Where programs are to run.

    Attributes:
        target: the devices, or their platform alone.
        device: the name of the roofline's device; None if it has none of that kind.
    """

    target: Target
    device: str | None


def parse_target(text: str) -> Place:
    """Looks up what a `--target` names; the compiler of that platform must be installed.

    Raises:
        ValueError: it is none of the valid forms.
    """
    kind, _, rest = text.partition(":")
    match kind, rest.split(":"):
        case "cpu", [""]:
            target = Target.of((jax.devices()[0],))
        case "export", [("tpu" | "cuda") as platform]:
            target = Target("gpu" if platform == "cuda" else platform)
        case "tpu", [_, _]:
            found = topologies.get_topology_desc(platform="tpu", topology_name=rest)
            target = Target.of(tuple(found.devices))
        case "gpu", [_, path, topology]:
            with open(path) as file:
                config = file.read()
            found = topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology)
            target = Target.of(tuple(found.devices))
        case _:
            raise ValueError(f"target {text!r}: valid are cpu, export:tpu, export:cuda, tpu:v5e:2x2 and the like")
    return Place(target, device_of(text))


def device_of(text: str) -> str | None:
    """Names the roofline's device for a `--target`; None if it has none of that kind."""
    kind, _, rest = text.partition(":")
    name = rest.partition(":")[0]
    name = f"tpu-{name}" if kind == "tpu" else name
    return name if name in roofline.DEVICES else None


class Programs:
    """The project's programs for a target, from shapes alone: `compile(kind, instance)`."""

    def __init__(self, setting: Setting, dtype: str, target: Target, instances: list[SDPointInstance]):
        model = setting.model(dtype)
        images = jax.ShapeDtypeStruct((1, *setting.image_shape), np.float32)
        variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        params = shapes_of(variables["params"])
        state = TrainState(jax.ShapeDtypeStruct((), np.int32), params, jax.eval_shape(OPTIMIZER.init, params))
        common = dict(model=model, preprocess=preprocess)
        with programs_for(target):
            batch_size = setting.batch_size * device_count()
            batch = {
                "images": shape_of_shards((batch_size, *setting.image_shape), np.uint8),
                "labels": shape_of_shards((batch_size,), np.int32),
            }
            self._training = TrainPrograms(state, batch, optimizer=OPTIMIZER, schedule=SCHEDULE, **common)
            shapes = dict(image_shape=setting.image_shape, preprocess=preprocess)
            self._evaluator = Evaluator(model, instances, batch_size=batch_size, **shapes)
            self._inference = InferencePrograms(model, **shapes)
            self._pools = Switch(build_pool, self._shapes_of_pool)
        self._model, self._setting, self._params, self._target = model, setting, params, target

    def compile(self, kind: str, instance: SDPointInstance) -> Any:
        """Compiles, or exports, one program; those that evaluate are of the layers after the instance's point."""
        if kind == "gradient":
            return self._training.gradients(instance)
        if kind == "update":
            return self._training._programs["update"]  # Of no instance, which is why the class hides it.
        if kind == "inference":
            return self._inference[instance, self._setting.batch_size]
        if kind == "pool":
            return self._pools[instance]
        return self._evaluator._programs[kind, instance]

    def blocks(self, instance: SDPointInstance) -> list[tuple[Any, Callable[[], Any]]]:
        """Lists stem, blocks and head of an instance: what tells one apart, and what compiles it both ways."""
        last, parts = self._model.num_blocks, []
        modules = (*self._model.prefix_modules(last), *self._model.suffix_modules(last))
        x = jax.ShapeDtypeStruct((self._setting.batch_size, *self._setting.image_shape), np.uint8)
        for number, spec in enumerate(("stem", *self._model.architecture.blocks(), "head")):
            run = functools.partial(run_part, self._model, instance, number)
            params = {modules[number]: self._params[modules[number]]}
            y = jax.eval_shape(run, params, x)
            parts.append(((spec, x.shape, y.shape), functools.partial(self._compile_part, run, number, params, x, y)))
            x = y
        return parts

    def _compile_part(self, run, number, *shapes):
        with programs_for(self._target):
            return build_part(run, number)(*shapes)

    def _shapes_of_pool(self, instance):
        """Returns the shapes of what the pool of an instance takes, and of its output's gradient."""
        operations = list_operations(self._model, instance, self._setting.image_size)
        name = "stem/pool" if instance.point == STEM else f"block_{instance.point:02d}/pool"
        pool = next(operation for operation in operations if operation.name == name)
        shapes = (self._setting.batch_size, *pool.input), (self._setting.batch_size, *pool.output)
        return tuple(jax.ShapeDtypeStruct(shape, self._model.dtype) for shape in shapes)


def run_part(model: ResNet, instance: SDPointInstance, number: int, params: Any, x: jax.Array) -> jax.Array:
    """Computes the stem (0), the block of that number, or behind the blocks the head, as in training."""
    last = model.num_blocks
    apply = functools.partial(model.apply, {"params": params}, train=True, mutable=["batch_stats"])
    if number == 0:
        return apply(preprocess(x), STEM, method="prefix")[0]
    if number <= last:
        return apply(x, number - 1 or STEM, number, instance=instance, method="between")[0]
    return apply(x, last, instance=instance if instance.point == last else FULL_RESOLUTION, method="suffix")[0]


def build_part(run: Callable, number: int) -> Any:
    """Makes what compiles a part, forward and backward; the images, which the first one takes, have no gradient."""

    def both_ways(params, x, gradient):
        _, backward = jax.vjp(run, params, x) if number else jax.vjp(lambda params: run(params, x), params)
        return backward(gradient)

    return on_device(both_ways, jax.devices()[0])


def build_pool(instance: SDPointInstance) -> Any:
    """Makes what compiles the pool of an instance, to the size of its output's gradient and back."""
    pool = adaptive_max_pool if instance.point == STEM else adaptive_avg_pool

    def pool_both_ways(x, gradient):
        pooled, backward = jax.vjp(functools.partial(pool, size=gradient.shape[1:3]), x)
        return pooled, *backward(gradient)

    return on_device(pool_both_ways, jax.devices()[0])


def measure(programs: Programs, kind: str, instance: SDPointInstance) -> dict:
    """Compiles one program, or those of `blocks`; returns their work and what the compiler says of them."""
    key = {"program": kind, "instance": instance.name}
    if kind != "blocks":
        return key | describe(lambda: programs.compile(kind, instance))
    different, parts = {}, programs.blocks(instance)
    for part, compile_part in parts:
        different[part] = different.get(part) or describe(compile_part)
    rows = [different[part] for part, _ in parts]
    total = {name: sum(row[name] or 0 for row in rows) for name in rows[0]}
    total["cpu_seconds"] = sum(row["cpu_seconds"] for row in different.values())
    if "peak" in total:
        total["peak"] = max(row["peak"] for row in rows)
    return key | total | {"different": len(different)}


def describe(compile_it: Callable[[], Any]) -> dict:
    """Compiles one program; returns its work and what the compiler says of it."""
    start = time.process_time()
    program = compile_it()
    row = {"cpu_seconds": time.process_time() - start}
    if isinstance(program, jax.export.Exported):
        return (
            row | {"bytes_of_module": len(program.mlir_module_serialized)} | count_convolutions(program.mlir_module())
        )
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    text = program.as_text() or ""
    return row | {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": getattr(memory, "peak_memory_in_bytes", 0)
        or memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "cycles": estimated_cycles(text),
        **count_compiled_convolutions(text),
    }


def count_convolutions(module: str) -> dict:
    """Counts the convolutions and matrix products of a StableHLO module, and those convolutions that take float32."""
    convolutions = re.findall(r"stablehlo\.convolution\(.*?: \(tensor<[^>]*?x(\w+)>", module)
    return {
        "convolutions": len(convolutions),
        "bfloat16_convolutions": convolutions.count("bf16"),
        "float32_convolutions": convolutions.count("f32"),
        "products": module.count("stablehlo.dot_general"),
    }


def count_compiled_convolutions(text: str) -> dict:
    """Counts the convolutions of a compiled program by what they take; matrix products, to XLA alike, are none."""
    types = dict(re.findall(r"%?([\w.\-]+)(?: =|:) (\w+)\[", text))
    taken = []
    for operands, rest in re.findall(r" (?:convolution|custom-call)\(([^)\n]*)\)([^\n]*)", text):
        if "dim_labels" in rest and "/dot_general" not in rest:
            taken.append({types.get(operand.split("%")[-1]) for operand in operands.split(",")[:2]})
    return {
        "bfloat16_convolutions": sum(kinds == {"bf16"} for kinds in taken),
        "float32_convolutions": sum("f32" in kinds for kinds in taken),
    }


def estimated_cycles(text: str) -> int | None:
    """Sums the cycles that the TPU compiler expects of the instructions of a program's entry; None without any."""
    entry = text[text.find("\nENTRY") :].partition("\n}")[0]
    cycles = [int(number) for number in re.findall(r'"estimated_cycles":"([0-9]+)"', entry)]
    return sum(cycles) or None


def estimate(setting: Setting, dtype: str, kind: str, instance: SDPointInstance, device: str | None) -> dict:
    """Returns what shapes say of a program: MACs, activations, and for a known device bytes and time."""
    if kind not in WHOLE:
        return {}
    model = setting.model(dtype)
    cost = count_cost(model, instance, setting.image_size)
    counted = {"macs": cost.macs, "activations": cost.activations} if kind != "update" else {}
    passes = roofline.list_passes(model, instance, setting.image_size, setting.batch_size, training=kind != "inference")
    passes = [one for one in passes if (one.name == "update") == (kind == "update")]
    counted["counted_bytes"] = sum(one.bytes for one in passes)
    if device:
        seconds = sum(one.seconds(roofline.get_device(device), model.dtype) for one in passes)
        counted["roofline_ms"] = 1e3 * seconds
    return counted


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Computes Spearman's coefficient; equal values share the mean of their ranks."""

    def ranks(values):
        return [np.mean([i for i, other in enumerate(sorted(values)) if other == value]) for value in values]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def choose(text: str, setting: Setting) -> list[SDPointInstance]:
    """Picks instances by their names, or a number of them that spread over the net; full resolution comes first."""
    if not text.isdecimal():
        named = [SDPointInstance.from_name(name) for name in text.split(",")]
        return list(dict.fromkeys([FULL_RESOLUTION, *named]))
    return list(report.spread(setting.model().instances(), int(text)))


COLUMNS = {  # Heading, key, scale and format of a table's cell.
    "CPU-s": ("cpu_seconds", 1, ".1f"),
    "peak, GiB": ("peak", 2**30, ".2f"),
    "GFLOP": ("flops", 1e9, ".0f"),
    "GB": ("bytes", 1e9, ".2f"),
    "counted GB": ("counted_bytes", 1e9, ".2f"),
    "roofline, ms": ("roofline_ms", 1, ".2f"),
    "compiler, ms": ("compiler_ms", 1, ".2f"),
}
RATIOS = {
    "MACs": "macs",
    "activations": "activations",
    "bytes": "bytes",
    "counted": "counted_bytes",
    "roofline": "roofline_ms",
    "compiler": "cycles",
}


def add_ratios(rows: list[dict]) -> None:
    """Adds to each row its `ratios` to that of the same program at full resolution; none for parts of the net."""
    full = {row["program"]: row for row in rows if row["instance"] == FULL_RESOLUTION.name}
    for row in rows:
        whole = full[row["program"]] if row["program"] in WHOLE else {}
        row["ratios"] = {name: row[key] / whole[key] for name, key in RATIOS.items() if row.get(key) and whole.get(key)}


def correlate(rows: list[dict]) -> dict[str, dict]:
    """Computes, per program, how well each count ranks the instances as the compiler does, and of how many."""
    found = {}
    for kind in PROGRAMS:
        known = [row for row in rows if row["program"] == kind and row.get("cycles") and row.get("roofline_ms")]
        if len(known) > 2:
            cycles = [row["cycles"] for row in known]
            keys = ("macs", "activations", "counted_bytes", "roofline_ms")
            found[kind] = {key: rank_correlation([row[key] for row in known], cycles) for key in keys}
            found[kind]["n"] = len(known)
    return found


def show(row: dict) -> str:
    """Formats a line of the table."""
    if "bytes_of_module" in row:
        counts = (
            f"{row[name]} {name.replace('_', ' ')}" for name in ("convolutions", "float32_convolutions", "products")
        )
        return f"{row['program']:<12}{row['instance']:<12}{row['cpu_seconds']:>8.1f}  {', '.join(counts)}"
    cells = (f"{row[key] / scale:>14{form}}" if row.get(key) else f"{'-':>14}" for key, scale, form in COLUMNS.values())
    ratios = ", ".join(f"{name} {value:.0%}" for name, value in row["ratios"].items())
    return f"{row['program']:<12}{row['instance']:<12}{''.join(cells)}  {ratios}"


def has_program(kind: str, instance: SDPointInstance) -> bool:
    """Tells whether there is such a program: one update for all instances, and no pool at full resolution."""
    is_full = instance == FULL_RESOLUTION
    return is_full if kind == "update" else not (is_full and kind == "pool")


class Results:
    """The rows of all programs that were compiled so far, in a file or, without a path, in memory."""

    def __init__(self, path: str):
        """Loads the file, if it is there."""
        self._path = pathlib.Path(path) if path else None
        exists = self._path is not None and self._path.exists()
        self.rows = [json.loads(line) for line in self._path.read_text().splitlines()] if exists else []
        for row in self.rows:
            row |= {"options": ""} | row | count(row)
        self._add_ratios()

    def find(self, key: dict) -> dict | None:
        """Returns the row of one program; None if it has not been compiled."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict) -> None:
        """Adds a row, and what is counted from shapes, and writes the file."""
        self.rows.append(row | count(row))
        self._add_ratios()
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(self._path, "".join(f"{json.dumps(row)}\n" for row in self.rows).encode())

    def by_setting(self) -> dict[tuple, list[dict]]:
        """Groups the rows by target, net, dtype and options."""
        groups = {}
        for row in self.rows:
            groups.setdefault(tuple(row[key] for key in KEYS[:SETTING]), []).append(row)
        return groups

    def _add_ratios(self):
        for rows in self.by_setting().values():
            add_ratios(rows)


def count(row: dict) -> dict:
    """Returns what a row's shapes and cycles say; see `estimate`."""
    device = device_of(row["target"])
    instance = SDPointInstance.from_name(row["instance"])
    counted = estimate(Setting.parse(row["net"]), row["dtype"], row["program"], instance, device)
    if row.get("cycles") and device in GIGAHERTZ:
        counted["compiler_ms"] = row["cycles"] / GIGAHERTZ[device] / 1e6
    return counted


def set_options(text: str) -> None:
    """Sets what `--options` names, for all that this process compiles from then on."""
    for option in filter(None, text.split(",")):
        name, _, value = option.partition("=")
        jax.config.update(name, type(getattr(jax.config, name))(value))


def run(
    target: str,
    net: str,
    dtype: str,
    instances: str,
    programs: str,
    results: Results | None = None,
    options: str = "",
) -> list[dict]:
    """Compiles those programs that the flags name and `results` lack; returns a row for each."""
    setting, results = Setting.parse(net), results or Results("")
    chosen = choose(instances, setting)
    kinds = PROGRAMS if programs == "all" else programs.split(",")
    wanted = [(kind, instance) for kind in kinds for instance in chosen if has_program(kind, instance)]
    set_options(options)
    compiled, rows = None, []
    for kind, instance in wanted:
        key = dict(zip(KEYS, (target, net, dtype, options, kind, instance.name)))
        if not results.find(key):
            compiled = compiled or Programs(setting, dtype, parse_target(target).target, chosen)
            versions = {name: version for name, version in report.versions(COMPILERS).items() if version}
            results.add(key | measure(compiled, kind, instance) | versions)
        rows.append(results.find(key))
        print(show(rows[-1]), flush=True)
    return rows


def summarise(results: Results) -> list[dict]:
    """Prints the summary of each setting; returns it."""
    found = []
    for setting, rows in results.by_setting().items():
        found.append(dict(zip(KEYS, setting)) | {"programs": len(rows), "rank_correlations": correlate(rows)})
        work = sum(row["cpu_seconds"] for row in rows)
        print(f"\n{' '.join(filter(None, setting))}: {len(rows)} programs, {work:.0f} CPU-s")
        for kind, correlations in found[-1]["rank_correlations"].items():
            values = ", ".join(f"{key} {value:.3f}" for key, value in correlations.items() if key != "n")
            print(f"  {kind}: rank correlation with the compiler's estimate: {values} (n = {correlations['n']})")
        device = device_of(setting[0])
        peak = max(row.get("peak", 0) for row in rows)
        if device and roofline.get_device(device).memory_gib:
            print(f"  fullest: {peak / 2**30:.2f} of {roofline.get_device(device).memory_gib} GiB")
        float32 = sum(row["float32_convolutions"] for row in rows)
        print(f"  float32 convolutions: {float32}; bfloat16: {sum(row['bfloat16_convolutions'] for row in rows)}")
    return found


def main():
    """Measures, prints the table, and writes the results where the flags say so."""
    options = report.parse(
        __doc__,
        {name: DEFAULTS | preset for name, preset in PRESETS.items()},
        target=(str, "see above"),
        instances=(str, "how many, spread over the net, or their names"),
        programs=(str, f"some of {','.join(PROGRAMS)}, or all"),
        results=(str, "file of rows; empty for none"),
        options=(str, "of JAX, see above; empty for none"),
    )
    print(report.heading())
    print(f"{'program':<12}{'instance':<12}{''.join(f'{name:>14}' for name in COLUMNS)}  of full resolution")
    results = Results(options.results)
    what = options.target, options.net, options.dtype, options.instances, options.programs
    rows = run(*what, results, options.options)
    report.write(options.json, options, programs=rows, summary=summarise(results))


if __name__ == "__main__":
    main()
