"""What the commands have in common: flags, one-line errors, exit codes."""

import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from sdpoint_jax.config import known_keys
from sdpoint_jax.programs.host_memory import keep_freed_memory

FAILED = 2  # Exit code after any error.
_CONFIGS = pathlib.Path("configs")


def define_config(default: str | None) -> None:
    """Defines --config=FILE, with overrides --config.KEY=VALUE; they are parsed here already, from the command line.

    Raises:
        ValueError: a file that is none, or an override of a key that the config does not have.
    """
    file = next((arg.partition("=")[2] for arg in sys.argv if arg.startswith("--config=")), default)
    if file and not pathlib.Path(file.partition(":")[0]).is_file():
        raise ValueError(
            f"--config={file}: no such file; there are {', '.join(sorted(map(str, _CONFIGS.glob('*.py'))))}"
        )
    try:
        config_flags.DEFINE_config_file("config", default, "File with get_config(). It is code, and is run.")
    except AttributeError as error:
        while error.__context__:  # The first cause names the key.
            error = error.__context__
        raise ValueError(f"config key {error}: known are {', '.join(known_keys())}") from error


def run(define_flags: Callable[[], None], main: Callable[[], int | None]) -> None:
    """Defines and parses flags, runs `main` and exits: with its code, or `FAILED` and one line on what is wrong."""

    def guarded(function, *args):
        try:
            return function(*args)
        except Exception as error:
            if any(arg in ("--debug", "--debug=true") for arg in sys.argv):
                raise
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            _leave_the_others()
            raise SystemExit(FAILED) from None

    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    _keep_compiled_programs()
    _quieten_orbax()
    flags.DEFINE_bool("debug", False, "Show where an error came from.")
    flags.DEFINE_bool("distributed", False, "One of several processes; the cluster (TPU pod, SLURM, GKE) says which.")
    flags.DEFINE_string("coordinator", "", "One of several processes, by hand: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes.")
    flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")
    flags.DEFINE_integer("heartbeat_seconds", 60, "A process that is silent so long ends the others.", lower_bound=1)
    guarded(define_flags)
    app.run(lambda _: guarded(_run_distributed, main), flags_parser=lambda argv: guarded(_parse, argv))


def _leave_the_others():
    """Ends this process if it is one of several: the usual end waits for the others, of which one may be dead."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        print("this process ends, and so will the others; the same command goes on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(FAILED)


def _run_distributed(main):
    values = flags.FLAGS
    by_hand = (values.coordinator, values.num_processes, values.process_id)
    if any(value not in ("", None) for value in by_hand):
        if "" in by_hand or None in by_hand or not 0 <= values.process_id < values.num_processes:
            raise ValueError(
                f"--coordinator={by_hand[0]} --num_processes={by_hand[1]} --process_id={by_hand[2]}: "
                "give all three, with process_id from 0 to num_processes - 1"
            )
        if not re.fullmatch(r".+:[0-9]+", values.coordinator):
            raise ValueError(f"--coordinator={values.coordinator}: give HOST:PORT of process 0, as 10.0.0.1:8476")
        _initialize_distributed(*by_hand)
    elif values.distributed:
        try:
            _initialize_distributed()
        except ValueError as error:
            raise ValueError(
                f"--distributed: no cluster found ({error}); give --coordinator, --num_processes and --process_id"
            ) from error
    return main()


def _initialize_distributed(*args):
    import jax  # Late, as it takes seconds and a mistyped flag should not.

    silence = flags.FLAGS.heartbeat_seconds
    jax.distributed.initialize(*args, heartbeat_timeout_seconds=silence, shutdown_timeout_seconds=silence)


def _parse(argv):
    try:
        rest = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        *_, last = str(error).strip().splitlines()  # After the traceback of a config's own error.
        raise ValueError(last.removeprefix("ValueError: ")) from error
    if rest[1:]:
        raise ValueError(f"argument {rest[1]!r}: flags begin with --, and take their value after =")
    return rest


def _keep_compiled_programs():
    """Lets JAX keep compiled programs for the next start, unless the environment says where, or that it should not."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "sdpoint_jax", "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _quieten_orbax():
    """Orbax raises a thread's error where it waits for the thread: no need to print a traceback as well."""
    shown = threading.excepthook
    threading.excepthook = lambda args: None if type(args.thread).__module__.startswith("orbax.") else shown(args)
