"""The flag --config=FILE_OR_NAME, with overrides --config.KEY=VALUE."""

import functools
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from sdpoint_jax.config import known_keys
from sdpoint_jax.paths import check_local

_PACKAGE = pathlib.Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # Of an installed package, of a checkout.

HELP = """config:
  --config=NAME or FILE      a shipped config by its name, as digits, or a file with get_config(), which is code and is
                             run; what stands after a colon is passed to it, as folder:/path/to/images
  --config.KEY=VALUE         another value for one key, as --config.model.name=resnet56"""


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the flags of the config, each joined with its value, and all others."""
    ours, others, rest = [], [], list(arguments)
    while rest:
        arg = rest.pop(0)
        if arg != "--config" and not arg.startswith(("--config=", "--config.", "--noconfig.")):
            others.append(arg)
        elif "=" not in arg and rest and not rest[0].startswith("-"):
            ours.append(f"{arg}={rest.pop(0)}")
        else:
            ours.append(arg)
    return ours, others


def load_config(arguments: Sequence[str], default: str | None) -> ConfigDict | None:
    """Loads the config that the flags describe.

    Args:
        arguments: the flags of the config; see `split_arguments`.
        default: name of the config without --config; None for no config.

    Returns:
        the config with its overrides, or None.

    Raises:
        ValueError: no such config, an override of a key that it does not have, a value that does not fit, or an
            address where a path belongs.
    """
    file = next((arg.partition("=")[2] for arg in arguments if arg.startswith("--config=")), None)
    overrides = [arg for arg in arguments if not arg.startswith("--config=")]
    if file is None and default is None:
        if overrides:
            raise ValueError(f"{overrides[0]}: give --config=NAME or FILE before it")
        return None
    argv = ["", f"--config={_find(default if file is None else file)}", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
        values(argv)
    except AttributeError as error:
        first: BaseException = error
        while first.__context__:  # The first cause names the key.
            first = first.__context__
        raise ValueError(f"config key {first}: known are {', '.join(known_keys())}") from error
    except flags.IllegalFlagValueError as error:
        *_, last = str(error).strip().splitlines()  # After the traceback of a config's own error.
        raise ValueError(last.removeprefix("ValueError: ")) from error
    for key in known_keys():
        value = functools.reduce(getattr, key.split("."), values.config)
        if isinstance(value, str):
            check_local(value, f"config.{key}=")
    return values.config


def _find(given):
    """Returns the path of a config, by its path or name, and after a colon what is passed to it."""
    file, colon, argument = given.partition(":")
    if pathlib.Path(file).is_file():
        return given
    shipped = {path.stem: path for folder in _FOLDERS for path in sorted(folder.glob("*.py"), reverse=True)}
    stem = pathlib.Path(file).stem
    if file in (stem, f"configs/{stem}.py") and stem in shipped:
        return f"{shipped[stem]}{colon}{argument}"
    names = ", ".join(sorted(path.name for path in shipped.values()))
    raise ValueError(f"--config={given}: no such file; there are {names}, by name as --config=digits, or give your own")
