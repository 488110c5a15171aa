"""Runs a command of the command line within the tests' process."""

from unittest import mock

import pytest

from sdpoint_jax.cli import main


def run(*arguments, code=0):
    """Runs `python -m sdpoint_jax ARGUMENTS`, which must exit with `code`."""
    with mock.patch.object(main, "_set_up"), pytest.raises(SystemExit) as ended:
        main.main([str(argument) for argument in arguments])
    assert ended.value.code == code


def error_of(capsys, *arguments):
    """Runs a command that must fail with one line, and returns that line."""
    run(*arguments, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error
