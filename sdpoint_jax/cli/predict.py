"""Classifies a folder of images, or those that a Parquet file lists, within a budget.

    python -m sdpoint_jax predict runs/digits/sweep/artefact --input=photos/ --output=results --max-macs=5_000_000

Writes part-*.parquet with path, label, class_name, probability, instance and error to --output. The same command goes
on with what is missing. Needs the extra: pip install 'sdpoint_jax[predict]'.
"""

import argparse
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
    from sdpoint_jax import progress
    from sdpoint_jax.serving import offline
    from sdpoint_jax.serving.predictor import Predictor
    from sdpoint_jax.serving.selection import Budget
    from sdpoint_jax.storage import checkpoint

    if args.batch_size < 1:
        raise ValueError(f"--batch-size={args.batch_size}: at least 1")
    inputs = offline.list_inputs(args.input)
    predictor = Predictor.load(args.artefact, args.runtime)
    budget = Budget(max_macs=args.max_macs, min_top1=args.min_top1)
    if args.instance and budget != Budget():
        raise ValueError(f"--instance={args.instance}: give a budget or an instance, not both")
    instance = predictor.find(args.instance) if args.instance else predictor.select(budget)
    files = (pathlib.Path(args.artefact) / checkpoint.FILES).read_bytes()
    plan = offline.make_plan(
        checkpoint.checksum_text(files),
        instance,
        inputs,
        args.output,
        part_size=args.part_size,
        on_bad_image=args.on_bad_image,
    )
    missing = offline.missing_parts(plan, args.output)
    done = plan.count - sum(len(range(plan.count)[plan.part(number)]) for number in missing)
    predictor.compile([instance], [args.batch_size])
    with progress.bar(total=plan.count, initial=done, desc=f"classifying on {instance.name}", unit="img") as bar:
        for count in offline.run_parts(predictor, plan, inputs, args.output, missing, batch_size=args.batch_size):
            bar.update(count)
    before = f" ({done} of them before)" if done else ""
    where = f"{instance.name} in {predictor.runtime_of(instance, args.batch_size)}"
    print(f"classified {plan.count} images on {where}{before}: {args.output}/part-*.parquet")
