"""The flag --config=FILE_OR_NAME, with overrides --config.KEY=VALUE."""

import difflib
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from sdpoint_jax.config import check_keys, known_keys, parse_value, unknown_key
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
    """Load the config that the flags describe.

    Args:
        arguments: the flags of the config; see `split_arguments`.
        default: name of the config without --config; None for no config.

    Returns:
        the config with its overrides, or None.

    Raises:
        ValueError: no such config, an override of a key that it does not have, a value that does not fit, or an
            address where a path belongs.
    """
    given = default
    overrides = []
    for arg in arguments:
        flag, equals, value = arg.partition("=")
        if flag != "--config":
            overrides.append(arg)
        elif not value:
            raise ValueError(f"{arg}: give a config by its name, as --config=digits, or a file")
        else:
            given = value
    if given is None:
        if overrides:
            raise ValueError(f"{overrides[0]}: give --config=NAME or FILE before it")
        return None
    config = _run(*_find(given))
    for override in overrides:
        _set(config, override)
    for key in known_keys():
        value = functools.reduce(getattr, key.split("."), config)
        if isinstance(value, str):
            check_local(value, f"config.{key}=")
    return config


def _run(path, argument):
    """Run a file that defines `get_config`, and return the config that it makes."""
    spec = importlib.util.spec_from_file_location("sdpoint_jax_config", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses in it look for their module there.
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        if make is None:
            raise ValueError("it has no get_config()")
        config = make(*argument)
        if not isinstance(config, ConfigDict):
            raise ValueError(f"get_config() returned {type(config).__name__}; start from default_config()")
    except ValueError as error:
        raise ValueError(f"--config={path}: {error}") from error
    except Exception as error:
        raise ValueError(f"--config={path}: {type(error).__name__}: {error}") from error
    check_keys(config)
    return config


def _set(config, override):
    """Set the key of `--config.KEY=VALUE`, `--config.KEY` or `--noconfig.KEY`, the last two of keys that are a bool."""
    flag, equals, text = override.partition("=")
    key = flag.removeprefix("--no").removeprefix("--").removeprefix("config.")
    if key not in known_keys():
        raise unknown_key(key)
    *path, last = key.split(".")
    target = functools.reduce(getattr, path, config)
    negated = flag.startswith("--no")
    if not equals and isinstance(target[last], bool):
        target[last] = not negated
    elif not equals or negated:
        raise ValueError(f"{override}: give a value, as --config.{key}={_as_text(target[last])}")
    else:
        target[last] = parse_value(key, text)


def _as_text(value):
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _find(given):
    """Return the path of a config, given by its path or name, and what is passed to it after a colon, in a tuple."""
    file, colon, argument = given.partition(":")
    passed = (argument,) if colon else ()
    if pathlib.Path(file).is_file():
        return file, passed
    shipped = {path.stem: path for folder in _FOLDERS for path in sorted(folder.glob("*.py"), reverse=True)}
    stem = pathlib.Path(file).stem
    if file in (stem, f"{stem}.py", f"configs/{stem}.py") and stem in shipped:
        return str(shipped[stem]), passed
    names = ", ".join(difflib.get_close_matches(stem, shipped, n=len(shipped), cutoff=0))
    raise ValueError(f"--config={given}: no such file or config; shipped are {names}, as --config=digits")
