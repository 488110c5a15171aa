"""A user without a home directory, or with one that cannot be written, computes all the same."""

import os
import subprocess
import sys

import pytest

from sdpoint_jax import data
from sdpoint_jax.data.prepare import prepare
from sdpoint_jax.programs.process import keep_compiled_programs


@pytest.fixture
def homeless(monkeypatch):
    """Neither HOME nor an entry in the list of users."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    return monkeypatch


def test_without_a_home_nothing_is_cached(homeless, capsys):
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert capsys.readouterr().err == (
        "compiled programs are not cached (no home directory); JAX_COMPILATION_CACHE_DIR names another folder\n"
    )
    homeless.setenv("JAX_COMPILATION_CACHE_DIR", "/given")
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/given" and not capsys.readouterr().err


def test_a_home_that_cannot_be_written_is_told_in_a_line(homeless, tmp_path, capsys):
    (tmp_path / "file").touch()
    homeless.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert f"not cached ({tmp_path}/file/sdpoint_jax/xla: Not a directory)" in capsys.readouterr().err


def test_the_digits_need_no_home(homeless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.load_dataset("digits").splits["test"] == 400
    assert not list(tmp_path.iterdir())  # As a folder called ~.
    (tmp_path / "file").touch()
    homeless.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    assert data.load_dataset("digits").splits["test"] == 400
    with pytest.raises(OSError, match="file"):
        data.load_dataset("digits", str(tmp_path / "file"))


def test_other_sets_say_that_they_need_a_place(homeless):
    for use in (data.load_dataset, prepare):
        with pytest.raises(ValueError, match="there is no home directory; give --data-dir, or set TFDS_DATA_DIR"):
            use("cifar10")


def test_a_locale_of_another_encoding_is_replaced_by_utf8():
    code = (
        "from sdpoint_jax.cli import main; main._use_utf8(); import sys; print(sys.getfilesystemencoding(), sys.argv)"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, "--workdir=bäume"]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert printed.decode() == "utf-8 ['-c', '--workdir=bäume']\n"
