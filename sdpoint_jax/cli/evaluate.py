"""Sweeps the SDPoint instances of a trained net: python evaluate.py --workdir=runs/digits

Re-estimates BatchNorm statistics for each instance, evaluates it, and writes to WORKDIR/sweep (or --output): sweep.csv,
sweep.json, sweep.png, and the artefact that Predictor loads. The same command goes on with a sweep that was
interrupted. Exit codes: 0 done, 2 error.
"""

import argparse
import functools
import pathlib

from sdpoint_jax.cli import config_flag, distributed, profile
from sdpoint_jax.cli.parser import add_model_flag, comma_separated
from sdpoint_jax.instance import FULL_RESOLUTION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.set_defaults(takes_config=True)
    parser.epilog = config_flag.HELP
    parser.add_argument("--workdir", default="runs/digits", help="folder of a run, or of imported weights")
    parser.add_argument("--output", default="", help="folder for the results; by default WORKDIR/sweep")
    parser.add_argument(
        "--instances", default="", help="names, as full,p03_r0.50; or all; by default those of the training"
    )
    parser.add_argument(
        "--points", default="", help="only these points: -1 the stem, 0 full resolution, 1, 2, ... blocks"
    )
    parser.add_argument("--ratios", default="", help="only these downsampling ratios")
    parser.add_argument("--split", default="", help="split of the data set to evaluate; by default that of the config")
    parser.add_argument(
        "--parameters",
        choices=("trained", "ema"),
        default="trained",
        help="ema: the average of the parameters, which a run with config.ema_decay keeps",
    )
    parser.add_argument(
        "--statistics",
        choices=("reestimated", "imported"),
        default="reestimated",
        help="imported: BatchNorm statistics that came with imported weights, which full resolution alone has",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation, for an artefact that computes in it; by default that of the training. The results of "
        "another one go to WORKDIR/sweep_DTYPE",
    )
    parser.add_argument("--reestimate-batches", type=int, help="batches to re-estimate from; default: of the config")
    parser.add_argument(
        "--reestimate-images",
        choices=("augmented", "clean"),
        help="which training images to re-estimate from; by default as in the config",
    )
    parser.add_argument("--data-dir", help="where the prepared data sets are, if not where the training had them")
    parser.add_argument(
        "--baseline",
        default="",
        help="workdir of the same net trained without SDPoint, and swept: for the plot",
    )
    profile.add_profile_flag(parser)
    parser.add_argument(
        "--cascades",
        default="",
        help="evaluate cascades as well: auto searches them; or names, as p03_r0.50+full,p01_r0.50+p05_r0.50+full",
    )
    parser.add_argument(
        "--calibration-split",
        default="",
        help="images to choose cascades on; by default the config's validation split, if the sweep reports another one",
    )
    parser.add_argument(
        "--calibration-images", type=int, default=10_000, help="at most so many of them; by default %(default)s"
    )
    add_model_flag(parser)
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Sweeps, writes the results and prints the table."""
    batch_sizes = () if args.profile is None else profile.parse_batch_sizes(args.profile, "profile")
    given = config_flag.load_config(args.config_arguments, default=None)
    distributed.start(args)
    if batch_sizes:
        profile.check_machine()
    from sdpoint_jax import config as configs  # Late: JAX takes seconds.
    from sdpoint_jax import progress
    from sdpoint_jax.evaluation import cascades, sweep, table
    from sdpoint_jax.models import registry
    from sdpoint_jax.profiling.macs import count_macs, distinct_instances
    from sdpoint_jax.programs import hosts
    from sdpoint_jax.storage import artefact, checkpoint

    baseline = table.read_baseline(args.baseline) if args.baseline else None
    arrays, record = hosts.together(functools.partial(checkpoint.load_newest, args.workdir))
    if given is None and "config" not in record:
        raise ValueError(f"{args.workdir}: holds no config, as imported weights: give --config=FILE, for the data")
    config = given or configs.from_dict(record["config"])
    net, attributes = configs.named_model(record)
    if "config" not in record and net and not any("config.model.name=" in arg for arg in args.config_arguments):
        # Imported weights know their net; a config is given for the data.
        registry.check_allowed(net, args.model, args.workdir)
        config.model.name, config.model.args = net, attributes
    if args.split:
        config.dataset.test_split = args.split
    if given is None:
        registry.check_allowed(config.model.name, args.model, f"{args.workdir}: the run")
    for key in ("reestimate_batches", "reestimate_images"):
        if getattr(args, key) is not None:
            config[key] = getattr(args, key)
    if args.data_dir is not None:
        config.dataset.data_dir = args.data_dir
    folder = "sweep" if args.dtype in (None, config.model.dtype) else f"sweep_{args.dtype}"
    config.model.dtype = args.dtype or config.model.dtype
    hosts.check_same(functools.partial(configs.facts, config))
    parts, params, statistics, instances = hosts.together(functools.partial(_open, args, config, arrays, record))
    if (
        args.statistics == "reestimated"
        and not args.instances
        and (args.points or args.ratios or config.instances == "all")
    ):
        instances, same = distinct_instances(parts.model, instances, parts.image_shape[:2], parts.image_shape[-1])
        for instance, reason in same.items():
            progress.say(f"{instance.name} is not swept: {reason}")
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / folder)
    split = parts.test_split
    progress.say(parts.describe_data(training=config.dataset.train_split, sweep=split))
    if args.statistics == "reestimated":
        then, now = record.get("images", {}).get("training"), list(parts.digest(config.dataset.train_split))
        if then not in (None, now):
            progress.say(f"other training images than the net was trained on: {then[0]} then, {now[0]} now")
    if args.cascades:
        held_out = {"calibration_split": args.calibration_split, "calibration_images": args.calibration_images}
        plan = cascades.plan_cascades(parts, instances, args.cascades, split=split, **held_out)
    rows = sweep.sweep(parts, params, instances, output, split=split, baseline=baseline, statistics=statistics)
    full_macs = count_macs(parts.model, FULL_RESOLUTION, parts.image_shape[:2], parts.image_shape[-1])
    print(table.format_table(rows, full_macs))
    print(f"written: {output}/sweep.csv, sweep.json, sweep.png and {artefact.ARTEFACT}, for Predictor.load")
    if args.cascades:
        found, _ = cascades.evaluate_cascades(parts, plan, output)
        if found:
            print(cascades.format_table(found, rows, full_macs))
            print(f"written: {output}/{cascades.TABLE}, {cascades.PLOT} and, in the artefact, the cascades themselves")
    if batch_sizes:
        profile.profile_artefact(output / artefact.ARTEFACT, batch_sizes, model=parts.model)


def _open(args, config, arrays, record):
    """Return (experiment, parameters, imported statistics or None, instances to sweep), all checked."""
    from sdpoint_jax import experiment

    parts = experiment.Experiment(config)
    params = _params(args, arrays)
    parts.check_params(params, args.workdir)
    parts.check_classes(record, args.workdir)
    statistics = _imported_statistics(args, arrays, parts) if args.statistics == "imported" else None
    instances = parts.instances if statistics is None else (FULL_RESOLUTION,)
    if args.instances or args.points or args.ratios:
        points, ratios = comma_separated(args.points, int, "points"), comma_separated(args.ratios, float, "ratios")
        instances = experiment.parse_instances(parts.model, args.instances or "all", points, ratios)
    parts.test_split  # noqa: B018  # Opens it.
    return parts, params, statistics, instances


def _params(args, arrays):
    if args.parameters == "trained":
        return arrays["params"]
    if "ema" not in arrays:
        raise ValueError(f"--parameters=ema: {args.workdir} holds no average; config.ema_decay keeps one in training")
    return arrays["ema"]


def _imported_statistics(args, arrays, experiment):
    if "batch_stats" not in arrays:
        raise ValueError(f"--statistics=imported: {args.workdir} holds no statistics, only imported weights do")
    experiment.check_statistics(arrays["batch_stats"], f"--statistics=imported: {args.workdir}")
    return arrays["batch_stats"]
