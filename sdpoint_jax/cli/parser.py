"""The parser of the command line: one class for all commands, flags with dashes, errors in one line."""

import argparse
import difflib
import importlib.metadata
import platform
import re
import sys
from typing import Any, NoReturn

import sdpoint_jax

FAILED = 2  # Exit code after any error.


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that allows a command to import a net of the user's own."""
    parser.add_argument(
        "--model", metavar="MODULE:CLASS", help="the artefact's net, where it is your own: its module's code is run"
    )


class ShowVersion(argparse.Action):
    """Print the versions that a report of a fault should name, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Look them up now: a command that does not ask for them should not pay for it."""
        names = ("jax", "jaxlib", "flax")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
        versions += [f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"]
        print(f"sdpoint_jax {sdpoint_jax.__version__} ({', '.join(versions)})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Parses flags written with dashes, and with underscores too; an error is one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses `args`, by default those of the process; exits with `FAILED` where they are wrong."""
        given = [_with_dashes(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, surplus = self.parse_known_args(given, namespace)
        for arg in surplus:
            if arg.startswith("-"):
                self.error(_unknown_flag(arg, self._flags(parsed)))
            if not hasattr(parsed, "inputs"):
                self.error(f"argument {arg!r}: flags begin with --, and take their value after =")
            parsed.inputs.append(arg)  # argparse takes only the first run of positional arguments for nargs="*".
        return parsed

    def _flags(self, parsed):
        """Return the flags of the command that was given."""
        parser = self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices[parsed.command]
        return [*parser._option_string_actions, *(["--config"] if parser.get_default("takes_config") else [])]

    def error(self, message: str) -> NoReturn:
        """Prints the message as one line and exits."""
        self.exit(FAILED, f"error: {' '.join(message.split())}\n")


def _unknown_flag(arg, flags):
    name = arg.partition("=")[0]
    near = difflib.get_close_matches(name, flags, n=3, cutoff=0.6)
    return f"Unknown command line flag {name.lstrip('-')!r}" + (f"; nearest: {', '.join(near)}" if near else "")


def _with_dashes(arg):
    """Spells the name of a flag with dashes; values and the keys of a config stay."""
    name = re.match(r"--[a-z_-]+(?=$|=)", arg)
    return arg if not name else name[0].replace("_", "-") + arg[name.end() :]


def comma_separated(text: str, kind: type, flag: str) -> list:
    """Splits the value of a flag into numbers; empty text into none.

    Raises:
        ValueError: a part is no number; names the flag.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--{flag}={text}: give numbers with commas between them") from None
