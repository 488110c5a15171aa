"""What the commands have in common: flags, one-line errors, exit codes."""

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from sdpoint_jax.config import known_keys

STOPPED = 75  # Exit code after a stop on request (EX_TEMPFAIL): the same command goes on.
FAILED = 2  # Exit code after any error.


def define_config(default: str | None):
    """Defines --config=FILE and its overrides, --config.KEY=VALUE; returns the flag's holder."""
    try:
        return config_flags.DEFINE_config_file("config", default, "File with get_config(). It is code, and is run.")
    except AttributeError as error:  # Overrides are parsed here; the first cause names the key.
        while error.__context__:
            error = error.__context__
        raise ValueError(f"config key {str(error)}: known are {', '.join(known_keys())}") from error


def run(define_flags: Callable[[], None], main: Callable[[], int | None]) -> None:
    """Defines and parses flags, runs `main` and exits: with its code, or `FAILED` and one line on what is wrong."""

    def guarded(function, *args):
        try:
            return function(*args)
        except Exception as error:
            if any(arg in ("--debug", "--debug=true") for arg in sys.argv):
                raise
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            raise SystemExit(FAILED) from None

    logging.set_verbosity(logging.WARNING)
    flags.DEFINE_bool("debug", False, "Show where an error came from.")
    guarded(define_flags)
    app.run(lambda _: guarded(main), flags_parser=lambda argv: guarded(_parse, argv))


def _parse(argv):
    rest = flags.FLAGS(argv)
    if rest[1:]:
        raise ValueError(f"argument {rest[1]!r}: flags begin with --, and take their value after =")
    return rest
