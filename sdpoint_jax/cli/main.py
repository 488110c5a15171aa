"""The command line: one parser, one rule for exit codes.

0: done. 2: an error, in one line. 75: stopped on request and saved; the same command goes on.
"""

import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

from sdpoint_jax.cli import config_flag, distributed
from sdpoint_jax.cli.parser import FAILED, Parser, ShowVersion
from sdpoint_jax.paths import check_local
from sdpoint_jax.training.stop import STOPPED

# The commands: the module with `add_arguments(parser)` and `run(args)`, and what it does.
COMMANDS = {
    "train": ("train", "train one net for all its SDPoint instances"),
    "evaluate": ("evaluate", "sweep the instances of a trained net: accuracy, cost, artefact"),
    "profile": ("profile", "time the instances of an artefact on the device at hand"),
    "select": ("select", "pick the instance for a budget"),
    "export": ("export", "export instances to run without this package: StableHLO, ONNX, safetensors"),
    "predict": ("predict", "classify a folder of images within a budget"),
    "serve": ("serve", "answer requests over HTTP, within an objective"),
    "cost": ("cost", "count what the instances of a net cost, before training"),
    "import": ("import_weights", "import PyTorch weights"),
    "prepare": ("prepare", "prepare a data set, once"),
}

_NOT_PATHS = ("--allowed-hosts", "--coordinator", "--host", "--token")


def main(arguments: Sequence[str] | None = None, *, command: str | None = None) -> NoReturn:
    """Runs a command and exits with its code.

    Args:
        arguments: the command and its arguments, by default those of the process.
        command: the one to run, where it is not the first of the arguments: for a script of its own, as train.py.
    """
    if arguments is None:
        _use_utf8()
    is_process, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    try:
        _check_paths(arguments)
    except ValueError as error:
        _fail(error)
    ours, others = config_flag.split_arguments(arguments)
    if command is None:
        args = _parser().parse_args(others)
        command = args.command
    else:
        script = _add_version(Parser(prog=f"{command}.py"))
        args = _add_command(script, command).parse_args(others)
    args.config_arguments = ours
    if ours and not getattr(args, "takes_config", False):
        _fail(ValueError(f"{ours[0]}: {command} takes no config"))
    try:
        _set_up()
        if command != "prepare" and not hasattr(args, "coordinator"):
            distributed.check_platform()  # Of several processes, after they have joined.
        code = importlib.import_module(_module(command)).run(args) or 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        code = STOPPED
    except Exception as error:
        if args.debug:
            raise
        code = _report(error)
    if is_process:
        _leave_compilers(code)
    raise SystemExit(code)


def _parser():
    parser = Parser(prog="python -m sdpoint_jax", description="Train one net, run it at dozens of costs (SDPoint).")
    _add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (_, summary) in COMMANDS.items():
        _add_command(commands.add_parser(name, help=summary), name)
    try:
        import argcomplete
    except ImportError:
        return parser
    argcomplete.autocomplete(parser)  # Completes with the Tab key, where the shell is set up for it.
    return parser


def _add_version(parser):
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print versions and exit")
    return parser


def _add_command(parser, command):
    module = importlib.import_module(_module(command))
    parser.description = module.__doc__
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    module.add_arguments(parser)
    return parser


def _check_paths(arguments):
    """Raise ValueError for an address in the value of any flag: new flags need not say that they take a path."""
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
        else:
            value = argument
        if flag not in _NOT_PATHS:
            check_local(value, f"{flag}=" if flag else "")
        if flag == "--config":  # Of FILE:ARGUMENT, the second may be a path as well.
            check_local(value.partition(":")[2], f"{flag}={value.partition(':')[0]}:")
        if not argument.startswith("--") or "=" in argument:
            flag = ""


def _module(command):
    return f"sdpoint_jax.cli.{COMMANDS[command][0]}"


def _use_utf8():
    """Start this process again in Python's UTF-8 mode if the locale has another encoding, as LC_ALL=C can have.

    TensorStore, which writes checkpoints, takes no paths in others.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _leave_compilers(code):
    """End the process at once if programs compile in the background: its usual end would wait for them, for minutes."""
    devices = sys.modules.get("sdpoint_jax.programs.devices")
    if devices and devices.is_compiling():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fail(error) -> NoReturn:
    raise SystemExit(_report(error))


def _report(error):
    """Print an error as one line; return the exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"  # Without the number of the error.
    print(f"error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr, flush=True)
    distributed.leave_the_others(error)
    return FAILED


def _set_up():
    """Prepares the process for JAX, Orbax and Grain, before any of them is imported."""
    from absl import flags, logging

    from sdpoint_jax.programs.host_memory import keep_freed_memory
    from sdpoint_jax.programs.process import keep_compiled_programs

    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # Libraries look for flags of their own there.
    keep_freed_memory()
    keep_compiled_programs()
    _quieten_orbax()
    # Without the line of code that warned, which says nothing to who gave a command.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"


def _quieten_orbax():
    """Keep tracebacks of Orbax's threads from the terminal: their errors are raised where it waits for them."""
    shown, unraisable = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda args: None if type(args.thread).__module__.startswith("orbax.") else shown(args)
    # orbax-checkpoint 0.12 logs them as well.
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    # TensorStore's other writes end later, and find Orbax's event loop closed.
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else unraisable(args)
