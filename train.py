"""Trains one net for all its SDPoint instances: python train.py --config=configs/digits.py --workdir=runs/digits

The same command goes on with a run that was stopped. Any key of the config can be set: --config.num_epochs=10
Exit codes: 0 trained to the end, 75 stopped on request (SIGTERM or Ctrl-C) and saved, 2 error.
"""

import sys

from absl import flags

from sdpoint_jax import command


def define_flags():
    flags.DEFINE_string("workdir", "runs/digits", "Folder of the run: checkpoints and logs.")
    command.define_config("configs/digits.py")


def main():
    from sdpoint_jax import training  # Late, as JAX takes seconds and a mistyped flag should not.

    try:
        results = training.train(flags.FLAGS.config, flags.FLAGS.workdir)
    except training.Interrupted as stop:
        print(f"{stop}; the same command goes on", file=sys.stderr)
        return command.STOPPED
    print(training.format_summary(results, flags.FLAGS.workdir))


if __name__ == "__main__":
    command.run(define_flags, main)
