"""Exports SDPoint instances of a sweep's artefact, to be run without this package.

    python -m sdpoint_jax export runs/digits/sweep/artefact --output=exported
    python -m sdpoint_jax export runs/digits/sweep/artefact --output=exported --instances=full,p03_r0.50 --format=onnx

Formats: stablehlo, programs for CPU, CUDA and TPU with a loader that needs jax, numpy and flatbuffers alone; onnx, with
one file of weights for all instances; safetensors, a folder per instance with torchvision's names. An export that is at
--output is replaced once the new one is complete.
"""

import argparse
import pathlib

from sdpoint_jax.cli.parser import add_model_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    add_model_flag(parser)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to write, new or an export")
    parser.add_argument(
        "--instances",
        default="pareto",
        help="names, as full,p03_r0.50; all; or pareto, the default: those that no other beats in cost and accuracy",
    )
    parser.add_argument(
        "--format", default="stablehlo", help="one or more of stablehlo, onnx, safetensors; stablehlo by default"
    )
    parser.add_argument(
        "--fold", action="store_true", help="in safetensors, make BatchNorm a part of the convolution before it"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the export and prints what is in it."""
    from sdpoint_jax.interop import bundle  # Late: JAX takes seconds.
    from sdpoint_jax.storage import artefact

    swept = artefact.load(args.artefact, args.model)
    instances = _instances(swept.rows, args.instances)
    formats = [name.strip() for name in args.format.split(",")]
    manifest = bundle.write(swept, instances, args.output, formats=formats, fold=args.fold)
    for row in manifest["instances"]:
        print(f"{row['instance']:<12} {', '.join(row['files'].values())}")
    total = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"exported {len(instances)} instances of {swept.model}: {args.output}, {total / 1e6:.1f} MB")


def _instances(rows, names):
    from sdpoint_jax.evaluation.table import pareto_front
    from sdpoint_jax.instance import SDPointInstance

    if names in ("pareto", "all"):
        return [row.instance for row in (pareto_front(rows) if names == "pareto" else rows)]
    return list(dict.fromkeys(SDPointInstance.from_name(name.strip()) for name in names.split(",")))
