"""Sweeps the SDPoint instances of a trained net: python evaluate.py --workdir=runs/digits

Re-estimates BatchNorm statistics for each instance, evaluates it, and writes to WORKDIR/sweep (or --output): sweep.csv,
sweep.json, sweep.png, and the artefact that Predictor loads. The same command goes on with a
sweep that was interrupted. Exit codes: 0 done, 2 error.
"""

import pathlib

from absl import flags

from sdpoint_jax.cli import command


def define_flags():
    flags.DEFINE_string("workdir", "runs/digits", "Folder of a run, or of imported weights.")
    flags.DEFINE_string("output", "", "Folder for the results; by default WORKDIR/sweep.")
    flags.DEFINE_string("instances", "", "Names, as full,p03_r0.50; or all. By default those of the training.")
    flags.DEFINE_list("points", [], "Only these downsampling points: -1 the stem, 0 full resolution, 1, 2, ... blocks.")
    flags.DEFINE_list("ratios", [], "Only these downsampling ratios.")
    flags.DEFINE_string("split", "", "Of the data set, to evaluate; by default the test split of the config.")
    flags.DEFINE_integer("reestimate_batches", None, "Batches to re-estimate from; by default as in the config.")
    flags.DEFINE_enum("reestimate_images", None, ["augmented", "clean"], "Likewise: which training images.")
    flags.DEFINE_string("data_dir", None, "Where the prepared data sets are, if not where the training had them.")
    flags.DEFINE_string(
        "baseline", "", "Workdir of the same net trained without SDPoint, swept before: marked in the plot."
    )
    command.define_config(None)


def numbers(flag, kind):
    try:
        return [kind(value) for value in flags.FLAGS[flag].value]
    except ValueError:
        raise ValueError(
            f"--{flag}={','.join(flags.FLAGS[flag].value)}: give numbers with commas between them"
        ) from None


def main():
    from sdpoint_jax import config as configs
    from sdpoint_jax import experiment
    from sdpoint_jax.evaluation import sweep  # Late: JAX takes seconds.
    from sdpoint_jax.storage import checkpoint

    values = flags.FLAGS
    baseline = sweep.baseline_row(values.baseline) if values.baseline else None
    arrays, record = checkpoint.load_newest(values.workdir)
    if values.config is None and "config" not in record:
        raise ValueError(f"{values.workdir}: holds no config, as imported weights: give --config=FILE, for the data")
    config = values.config or configs.from_dict(record["config"])
    for key in ("reestimate_batches", "reestimate_images"):
        if values[key].value is not None:
            config[key] = values[key].value
    if values.data_dir is not None:
        config.dataset.data_dir = values.data_dir
    parts = experiment.Experiment(config)
    parts.check_params(arrays["params"], values.workdir)
    instances = parts.instances
    if values.instances or values.points or values.ratios:
        points, ratios = numbers("points", int), numbers("ratios", float)
        instances = experiment.parse_instances(parts.model, values.instances or "all", points, ratios)
    output = pathlib.Path(values.output or pathlib.Path(values.workdir) / "sweep")
    rows = sweep.sweep(
        parts, arrays["params"], instances, output, split=values.split or config.dataset.test_split, baseline=baseline
    )
    print(sweep.format_table(rows))
    print(f"written: {output}/sweep.csv, sweep.json, sweep.png and {sweep.ARTEFACT}, for Predictor.load")


if __name__ == "__main__":
    command.run(define_flags, main)
