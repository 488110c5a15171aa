"""Addresses of cloud storages are refused wherever a path belongs, before anything else happens."""

import os
import pathlib

import commands
import numpy as np
import pytest

from sdpoint_jax import Predictor, load_checkpoint
from sdpoint_jax.cli import config_flag
from sdpoint_jax.cli.main import COMMANDS
from sdpoint_jax.data import load_dataset
from sdpoint_jax.data.prepare import prepare
from sdpoint_jax.paths import check_local
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.storage.lock import FolderLock

ADDRESSES = ["gs://b/x", "s3://b/x", "hf://org/x", "GS://b", "file:///x", "gs:/b/x", "https://h/x", "memory://x"]
PATHS = [
    "runs/digits",
    "/x",
    "/data/gs:/b",
    "a:b/c",
    "C:/x",
    "folder:/x",
    "x.py:/y",
    "runs/a:b://c",
    "~/x",
    "",
    "12:/x",
]


@pytest.mark.parametrize("address", [*ADDRESSES, *(f"folder:{address}" for address in ADDRESSES)])
def test_an_address_is_told_by_its_scheme(address):
    with pytest.raises(ValueError, match=f"^--output={address}: [a-zA-Z0-9]+:// addresses are not supported; give a"):
        check_local(address, "--output=")
    if "memory" not in address:  # pathlib leaves one slash, which is told for the usual schemes alone.
        with pytest.raises(ValueError, match="addresses are not supported"):
            check_local(pathlib.Path(address))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_none(path):
    check_local(path)
    check_local(pathlib.Path(path))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_address_in_any_flag_and_writes_nothing(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, named in (
        (["--some-flag=gs://b/x"], "--some-flag=gs://b/x"),
        (["--some-flag", "s3://b/x"], "--some-flag=s3://b/x"),
        (["hf://org/x", "--some-flag=1"], "hf://org/x"),
        (["folder:gs:/b/x"], "folder:gs:/b/x"),
        (["--config=gs://b/c.py"], "--config=gs://b/c.py"),
        (["--config=configs/folder.py:gs://b/x"], "--config=configs/folder.py:gs://b/x"),
        (["--config.teacher=gs://b/x"], "--config.teacher=gs://b/x"),
    ):
        error = commands.error_of(capsys, command, *arguments)
        assert error.startswith(f"error: {named}: ") and "addresses are not supported" in error
    assert not os.listdir(tmp_path)


def test_a_token_or_a_host_may_look_like_an_address(capsys):
    error = commands.error_of(capsys, "serve", "--token=gs://b", "--host=http://h", "--coordinator", "http://h:1")
    assert "addresses" not in error


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # Of ml_collections.
@pytest.mark.parametrize("key", ["dataset.name", "dataset.data_dir", "init_from", "teacher"])
def test_an_address_that_a_config_file_sets_is_refused(tmp_path, key):
    lines = ["from sdpoint_jax.config import default_config", "def get_config():", "    config = default_config()"]
    (tmp_path / "c.py").write_text("\n".join([*lines, f"    config.{key} = 'gs://b/x'", "    return config", ""]))
    with pytest.raises(ValueError, match=f"^config.{key}=gs://b/x: gs:// addresses are not supported"):
        config_flag.load_config([f"--config={tmp_path}/c.py"], None)


FUNCTIONS = {
    "load_checkpoint": load_checkpoint,
    "Predictor.load": Predictor.load,
    "checkpoint.load": checkpoint.load,
    "checkpoint.newest": checkpoint.newest,
    "checkpoint.save": lambda path: checkpoint.save(path, {"a": np.zeros(1)}, {}),
    "FolderLock": lambda path: FolderLock(path, "workdir"),
    "load_dataset": lambda path: load_dataset(f"folder:{path}"),
    "load_dataset in": lambda path: load_dataset("digits", str(path)),
    "prepare": lambda path: prepare(f"folder:{path}"),
    "prepare into": lambda path: prepare("digits", str(path)),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_functions_refuse_an_address_as_commands_do(function, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://?b/x: gs:// addresses are not supported"):
        function(kind("gs://b/x"))
    assert not os.listdir(tmp_path)


def test_an_address_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://b/x")
    with pytest.raises(ValueError, match="^data_dir gs://b/x: gs:// addresses"):
        load_dataset("digits")
