"""Trains one net for all its SDPoint instances: python train.py --config=digits --workdir=runs/digits

The same command goes on with a run that was stopped. Any key of the config can be set: --config.num_epochs=10
A --config file is code, and is run; what is in a workdir is data alone.
Exit codes: 0 trained to the end, 75 stopped on request (SIGTERM or Ctrl-C) and saved, 2 error.
"""

import argparse
import pathlib
import sys
from typing import Any

from sdpoint_jax.cli import config_flag, distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.set_defaults(takes_config=True)
    parser.epilog = config_flag.HELP
    parser.add_argument("--workdir", default="runs/digits", help="folder of the run: checkpoints and logs")
    parser.add_argument("--data-dir", help="where the prepared data sets are; by default as in the config")
    parser.add_argument(
        "--replay-step", type=int, help="only compute this step again, from its checkpoint, and show its loss"
    )
    distributed.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains; ends the process with `STOPPED` after a stop."""
    config: Any = config_flag.load_config(args.config_arguments, default="digits")
    distributed.start(args)
    from sdpoint_jax.training import loop, replay, stop  # Late, as JAX takes seconds and a mistyped flag should not.

    if args.data_dir is not None:
        config.dataset.data_dir = args.data_dir
    workdir = pathlib.Path(args.workdir)
    if args.replay_step is not None:
        print(replay.replay(config, workdir, args.replay_step))
        return
    try:
        results = loop.train(config, workdir)
    except loop.Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on", file=sys.stderr)
        stop.leave()
    print(loop.format_summary(results, workdir))
