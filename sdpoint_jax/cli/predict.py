"""Classifies images within a budget.

    python -m sdpoint_jax predict runs/digits/sweep/artefact photo.jpg --top=5
    python -m sdpoint_jax predict runs/digits/sweep/artefact photos/ --output=results.csv --max-macs=5_000_000
    python -m sdpoint_jax predict runs/digits/sweep/artefact photos/ --output=results

An image, a folder of images at any depth, or a list of images: a .parquet, .csv or .jsonl file with a column 'path'.
Without --output, a line with path, class and probability is printed for each class. A name that ends in .parquet, .csv
or .jsonl is one file of results, any other name is a folder of Parquet files (part-*.parquet). Their columns are path,
rank, label, class_name, probability, instance and error. The same command resumes after a stop. Files need the extra:
pip install 'sdpoint_jax[predict]'.
"""

import argparse
import os
import pathlib
import sys

from sdpoint_jax.cli.parser import add_model_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("artefact", help="as runs/digits/sweep/artefact")
    add_model_flag(parser)
    parser.add_argument("inputs", nargs="*", metavar="input", help="images, folders of images, or lists of images")
    parser.add_argument("--input", action="append", default=[], help="one more input")
    parser.add_argument("--output", default="-", help="folder or file for the results; - (default): print them")
    parser.add_argument("--top", type=int, default=1, help="classes of each image, the likeliest first; 1 by default")
    parser.add_argument("--instance", help="the instance, by name, instead of a budget")
    parser.add_argument("--max-macs", type=float, help="the most MACs that one image may cost")
    parser.add_argument("--min-top1", type=float, help="the top-1 accuracy that is needed, in 0..1: the cheapest such")
    parser.add_argument("--runtime", default="auto", help="xla, onnxruntime, or auto (default): the faster one")
    parser.add_argument("--batch-size", type=int, default=64, help="images that are classified at once; 64 by default")
    parser.add_argument("--part-size", type=int, default=1024, help="images of one Parquet file; 1024 by default")
    parser.add_argument("--ray", action="store_true", help="classify on Ray: on the cluster at RAY_ADDRESS, else here")
    parser.add_argument("--workers", type=int, help="with --ray: processes; by default one per GPU or TPU chip")
    parser.add_argument(
        "--on-bad-image",
        default="error",
        help="error (default), or skip: a row without a class, whose column error says what is wrong",
    )


def run(args: argparse.Namespace) -> None:
    """Classify what is missing, and print a summary."""
    from sdpoint_jax.serving import offline

    args.inputs = [*args.inputs, *args.input]
    if not args.inputs:
        raise ValueError("no input: give images, a folder or a list, as: predict ARTEFACT photo.jpg")
    if args.on_bad_image not in offline.ON_BAD_IMAGE:
        raise ValueError(f"--on-bad-image={args.on_bad_image}: valid are {', '.join(offline.ON_BAD_IMAGE)}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size={args.batch_size}: at least 1")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers={args.workers}: at least 1")
    if args.output == "-":
        if args.ray:
            raise ValueError("--ray: needs --output, a folder or file that all machines see")
        return _print_classes(args)
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: --output needs the extra, pip install 'sdpoint_jax[predict]'") from None
    if not args.ray:
        return _write_classes(args, _here)
    try:
        from sdpoint_jax.serving import ray_cluster
    except ImportError as error:
        raise ImportError(f"{error}: --ray needs the extra, pip install 'sdpoint_jax[ray]'") from None
    with ray_cluster.connected():
        _write_classes(args, _on_ray)


def _print_classes(args):
    """Print path, class and probability, with tabs between them."""
    from sdpoint_jax import progress
    from sdpoint_jax.data.decode import BadImageError
    from sdpoint_jax.serving import offline
    from sdpoint_jax.serving.predictor import Predictor

    images, swept, row, plan = _prepare(args, part_size=args.batch_size)
    predictor, unreadable = Predictor(swept, runtime=args.runtime), 0
    predictor.compile([row.instance], [args.batch_size])
    settings = dict(batch_size=args.batch_size, on_bad_image=args.on_bad_image)
    sys.stdout.reconfigure(errors="backslashreplace")  # Names of classes, where a terminal has no UTF-8.
    try:
        with progress.bar(total=plan.count, desc=f"classifying on {row.name}", unit="img", leave=False) as bar:
            for number in range(plan.num_parts):
                part = images[plan.part(number)]
                rows = offline.classify(predictor, plan, part, **settings)
                bar.clear()
                for found in rows:
                    path = _printable(found["path"])
                    if found["error"] is None:
                        print(path, _printable(found["class_name"]), f"{found['probability']:.4f}", sep="\t")
                    else:
                        unreadable += 1
                        _say(f"{path}: {_printable(found['error'])}")
                sys.stdout.flush()
                bar.update(len(part))
    except BadImageError as error:
        raise _with_hint(error) from None
    except BrokenPipeError:  # The reader, as `head`, has enough. Python would write to it once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _say(_summarize(plan, row, unreadable=unreadable))


def _printable(text):
    """Escape what would break the line, or steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _write_classes(args, run_parts):
    """Classify what is missing by `run_parts`, which yields (images, unreadable images) of each part."""
    from sdpoint_jax import progress
    from sdpoint_jax.data.decode import BadImageError
    from sdpoint_jax.serving import offline

    output = pathlib.Path(args.output).expanduser()
    is_file = output.suffix.lower() in offline.ENDINGS and not output.is_dir()
    if output.suffix[1:].isalpha() and not is_file and not output.exists():  # As .json, .tsv, .xlsx.
        raise ValueError(f"--output={output}: valid endings are {', '.join(offline.ENDINGS)}; a folder has none")
    parts = output.with_name(f"{output.name}.parts") if is_file else output
    if is_file and output.exists():
        raise ValueError(f"--output={output}: is there already; move it, or give another name")
    images, swept, row, plan = _prepare(args, part_size=args.part_size, exclude=(output, parts))
    missing, damaged, unreadable = offline.find_progress(plan, parts, args.on_bad_image)
    for number in damaged:
        _say(f"{offline.part_path(parts, number)}: damaged, is written again")
    parts.mkdir(parents=True, exist_ok=True)
    before = plan.count - sum(len(images[plan.part(number)]) for number in missing)
    try:
        with progress.bar(total=plan.count, initial=before, desc=f"classifying on {row.name}", unit="img") as bar:
            for done, bad in run_parts(args, swept, plan, images, parts, missing) if missing else ():
                bar.update(done)
                unreadable += bad
    except BadImageError as error:
        raise _with_hint(error) from None
    if is_file:
        offline.join_parts(plan, parts, output)
    else:
        offline.remove_leftovers(output)
    print(f"{_summarize(plan, row, before, unreadable)}: {output if is_file else output / 'part-*.parquet'}")


def _prepare(args, part_size, exclude=()):
    """Return (images, artefact, row of the instance, plan); cut `args.batch_size` to what the images need."""
    from sdpoint_jax.choice.selection import Budget, select
    from sdpoint_jax.instance import SDPointInstance
    from sdpoint_jax.serving import offline
    from sdpoint_jax.storage import artefact

    budget = Budget(max_macs=args.max_macs, min_top1=args.min_top1)
    if args.instance and budget != Budget():
        raise ValueError(f"--instance={args.instance}: give a budget or an instance, not both")
    images, passed_over = offline.list_images(args.inputs, exclude)
    if passed_over:
        listed = ", ".join(map(_printable, passed_over[:3])) + (", ..." if len(passed_over) > 3 else "")
        _say(f"passed over {_count(len(passed_over), 'file')} without an image: {listed}")
    swept = artefact.load(args.artefact, args.model)
    row = swept.row(SDPointInstance.from_name(args.instance)) if args.instance else select(swept.rows, budget)
    plan = offline.make_plan(swept, row.instance, images, part_size=part_size, top=args.top)
    # To compile for a batch of 64 takes as long as for one, but a single photograph would be padded to 64.
    args.batch_size = min(args.batch_size, 1 << (plan.count - 1).bit_length())
    return images, swept, row, plan


def _summarize(plan, row, before=0, unreadable=0):
    notes = [f"{before} of them before"] if before else []
    notes += [f"{unreadable} could not be read"] if unreadable else []
    return f"classified {_count(plan.count, 'image')} on {row.name}" + (f" ({', '.join(notes)})" if notes else "")


def _count(number, what):
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _with_hint(error):
    return ValueError(f"{_printable(str(error))}; with --on-bad-image=skip the others are classified")


def _say(line):
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _here(args, swept, plan, images, parts, missing):
    from sdpoint_jax import progress
    from sdpoint_jax.serving import offline
    from sdpoint_jax.serving.predictor import Predictor

    predictor = Predictor(swept, runtime=args.runtime)
    predictor.compile([plan.instance], [args.batch_size])
    progress.say(f"runtime: {predictor.runtime_of(plan.instance, args.batch_size)}")
    settings = dict(batch_size=args.batch_size, on_bad_image=args.on_bad_image)
    return offline.run_parts(predictor, plan, images, parts, missing, **settings)


def _on_ray(args, swept, plan, images, parts, missing):
    from sdpoint_jax.serving import ray_offline

    return ray_offline.run_parts(
        os.path.abspath(args.artefact),
        plan,
        images,
        parts.absolute(),
        missing,
        batch_size=args.batch_size,
        on_bad_image=args.on_bad_image,
        workers=args.workers,
        runtime=args.runtime,
        model=args.model,
    )
