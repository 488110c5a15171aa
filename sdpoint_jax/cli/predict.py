"""Classifies a folder of images, or those that a Parquet file lists, within a budget.

    python -m sdpoint_jax predict runs/digits/sweep/artefact --input=photos/ --output=results --max-macs=5_000_000

Writes part-*.parquet with path, label, class_name, probability, instance and error to --output. The same command goes
on with what is missing. Needs the extra: pip install 'sdpoint_jax[predict]'.
"""

import argparse
import os
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    parser.add_argument("--input", required=True, help="a folder of images, or a .parquet file with a column 'path'")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for the results")
    parser.add_argument("--instance", help="the instance, by name, instead of a budget")
    parser.add_argument("--max-macs", type=float, help="the most MACs that one image may cost")
    parser.add_argument("--min-top1", type=float, help="the top-1 accuracy that is needed, in 0..1: the cheapest such")
    parser.add_argument("--runtime", default="auto", help="xla, onnxruntime, or auto (default): the faster one")
    parser.add_argument("--batch-size", type=int, default=64, help="images that are classified at once; 64 by default")
    parser.add_argument("--part-size", type=int, default=1024, help="images of one output file; 1024 by default")
    parser.add_argument("--ray", action="store_true", help="classify on Ray: on the cluster at RAY_ADDRESS, else here")
    parser.add_argument("--workers", type=int, help="with --ray: processes; by default one per GPU or TPU chip")
    parser.add_argument(
        "--on-bad-image",
        default="error",
        help="error (default), or skip: a row without a class that says what is wrong",
    )


def run(args: argparse.Namespace) -> None:
    """Classifies what is missing, and prints a summary."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: it needs the extra, pip install 'sdpoint_jax[predict]'") from None
    if args.batch_size < 1:
        raise ValueError(f"--batch-size={args.batch_size}: at least 1")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers={args.workers}: at least 1")
    if not args.ray:
        return _classify(args, _here)
    try:
        from sdpoint_jax.serving import ray_cluster
    except ImportError as error:
        raise ImportError(f"{error}: --ray needs the extra, pip install 'sdpoint_jax[ray]'") from None
    with ray_cluster.connected():
        _classify(args, _on_ray)


def _classify(args, run_parts):
    """Classifies what is missing by `run_parts`, which yields how many images each part had."""
    from sdpoint_jax import progress
    from sdpoint_jax.instance import SDPointInstance
    from sdpoint_jax.serving import offline
    from sdpoint_jax.serving.selection import Budget, select
    from sdpoint_jax.storage import artefact, checkpoint

    inputs = offline.list_inputs(args.input)
    swept = artefact.load(args.artefact)
    budget = Budget(max_macs=args.max_macs, min_top1=args.min_top1)
    if args.instance and budget != Budget():
        raise ValueError(f"--instance={args.instance}: give a budget or an instance, not both")
    row = swept.row(SDPointInstance.from_name(args.instance)) if args.instance else select(swept.rows, budget)
    files = (pathlib.Path(args.artefact) / checkpoint.FILES).read_bytes()
    plan = offline.make_plan(
        checkpoint.checksum_text(files),
        row.instance,
        inputs,
        args.output,
        part_size=args.part_size,
        on_bad_image=args.on_bad_image,
    )
    missing = offline.missing_parts(plan, args.output)
    done = plan.count - sum(len(range(plan.count)[plan.part(number)]) for number in missing)
    with progress.bar(total=plan.count, initial=done, desc=f"classifying on {row.name}", unit="img") as bar:
        for count in run_parts(args, swept, plan, inputs, missing) if missing else ():
            bar.update(count)
    before = f" ({done} of them before)" if done else ""
    print(f"classified {plan.count} images on {row.name}{before}: {args.output}/part-*.parquet")


def _here(args, swept, plan, inputs, missing):
    from sdpoint_jax import progress
    from sdpoint_jax.serving import offline
    from sdpoint_jax.serving.predictor import Predictor

    predictor = Predictor(swept, runtime=args.runtime)
    predictor.compile([plan.instance], [args.batch_size])
    progress.say(f"runtime: {predictor.runtime_of(plan.instance, args.batch_size)}")
    return offline.run_parts(predictor, plan, inputs, args.output, missing, batch_size=args.batch_size)


def _on_ray(args, swept, plan, inputs, missing):
    from sdpoint_jax.serving import ray_offline

    return ray_offline.run_parts(
        os.path.abspath(args.artefact),
        plan,
        inputs,
        args.output.absolute(),
        missing,
        batch_size=args.batch_size,
        workers=args.workers,
        runtime=args.runtime,
    )
