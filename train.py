"""Trains one net for all its SDPoint instances: python train.py --config=configs/digits.py --workdir=runs/digits

The same command goes on with a run that was stopped. Any key of the config can be set: --config.num_epochs=10
A --config file is code, and is run; what is in a workdir is data alone.
Exit codes: 0 trained to the end, 75 stopped on request (SIGTERM or Ctrl-C) and saved, 2 error.
"""

import pathlib
import sys

from absl import flags

from sdpoint_jax.cli import command
from sdpoint_jax.training import stop as interruption


def define_flags():
    flags.DEFINE_string("workdir", "runs/digits", "Folder of the run: checkpoints and logs.")
    flags.DEFINE_integer("replay_step", None, "Only compute this step again, from its checkpoint, and show its loss.")
    command.define_config("configs/digits.py")


def main():
    from sdpoint_jax.training import loop as training
    from sdpoint_jax.training import replay  # Late, as JAX takes seconds and a mistyped flag should not.

    config, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    if flags.FLAGS.replay_step is not None:
        print(replay.replay(config, workdir, flags.FLAGS.replay_step))
        return None
    try:
        results = training.train(config, workdir)
    except training.Interrupted as stop:
        print(f"{stop}; the same command goes on", file=sys.stderr)
        return interruption.STOPPED
    print(training.format_summary(results, workdir))


if __name__ == "__main__":
    command.run(define_flags, main)
