"""One process of several, as on the hosts of a TPU pod: flags, start, and end."""

import argparse
import os
import re
import sys

from sdpoint_jax.cli.parser import FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that make the command one of several processes."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes; the cluster (TPU pod, SLURM, GKE) says which",
    )
    group.add_argument("--coordinator", default="", help="one of several processes, by hand: HOST:PORT of process 0")
    group.add_argument("--num-processes", type=int, help="with --coordinator: how many processes")
    group.add_argument("--process-id", type=int, help="with --coordinator: which of them this is, from 0")
    group.add_argument(
        "--heartbeat-seconds", type=int, default=60, help="a process that is silent so long ends the others"
    )


def start(args: argparse.Namespace) -> None:
    """Joins the other processes if the flags say that there are some.

    Raises:
        ValueError: flags that do not fit together, or no cluster found.
    """
    if args.heartbeat_seconds < 1:
        raise ValueError(f"--heartbeat-seconds={args.heartbeat_seconds}: at least 1")
    by_hand = (args.coordinator, args.num_processes, args.process_id)
    if any(value not in ("", None) for value in by_hand):
        if "" in by_hand or None in by_hand or not 0 <= args.process_id < args.num_processes:
            raise ValueError(
                f"--coordinator={by_hand[0]} --num-processes={by_hand[1]} --process-id={by_hand[2]}: "
                "give all three, with process-id from 0 to num-processes - 1"
            )
        if not re.fullmatch(r".+:[0-9]+", args.coordinator):
            raise ValueError(f"--coordinator={args.coordinator}: give HOST:PORT of process 0, as 10.0.0.1:8476")
        _initialize(args.heartbeat_seconds, *by_hand)
    elif args.distributed:
        try:
            _initialize(args.heartbeat_seconds)
        except ValueError as error:
            raise ValueError(
                f"--distributed: no cluster found ({error}); give --coordinator, --num-processes and --process-id"
            ) from error
    check_platform()


def check_platform() -> None:
    """Raise ValueError if JAX_PLATFORMS names devices that are not here; call it once all processes are joined."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted in ("", "cpu"):
        return
    import jax

    try:
        jax.devices()
    except Exception as error:  # For cuda without its plugin, an AssertionError without a word.
        said = " ".join(str(error).split())
        raise ValueError(f"JAX_PLATFORMS={wanted}: JAX finds no such device; unset it, or set cpu. {said}") from error


def leave_the_others(error: Exception) -> None:
    """End this process if it is one of several: the usual end waits for the others, of which one may be dead."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        if getattr(error, "on_all_hosts", False):
            jax.distributed.shutdown()  # All end now; one that ended first would abort the others in mid-message.
            sys.stdout.flush()
            os._exit(FAILED)
        print("this process ends, and so will the others; the same command goes on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(FAILED)


def _initialize(silence, *args):
    import jax  # Late, as it takes seconds and a mistyped flag should not.

    jax.distributed.initialize(*args, heartbeat_timeout_seconds=silence, shutdown_timeout_seconds=silence)
