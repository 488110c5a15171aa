"""--config runs a file, and --config.KEY sets a key of what it returns."""

import pytest

from sdpoint_jax.cli import config_flag
from sdpoint_jax.storage import artefact, checkpoint


def load(*flags):
    ours, others = config_flag.split_arguments(["--config=digits", *flags])
    assert not others
    return config_flag.load_config(ours, default=None)


def test_the_last_value_of_a_key_counts():
    assert load("--config.num_epochs=5", "--config.num_epochs", "7").num_epochs == 7


def test_a_bool_needs_no_value():
    assert load("--config.nesterov").nesterov and not load("--config.nesterov", "--noconfig.nesterov").nesterov


@pytest.mark.parametrize("flag", ["--noconfig.seed", "--config.seed", "--noconfig.nesterov=1"])
def test_a_value_is_asked_for(flag):
    with pytest.raises(ValueError, match=f"^{flag}: give a value, as --config"):
        load(flag)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "it has no get_config"),
        ("def get_config(): return 3", "returned int; start from default_config"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(: pass", "SyntaxError"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()", "config has no batch_size"),
    ],
)
def test_a_file_that_makes_no_config_is_named(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        config_flag.load_config([f"--config={tmp_path}/mine.py"], None)
    assert "mine.py" in str(error.value) or "start from" in str(error.value)


def test_a_file_with_windows_lines_and_an_argument(tmp_path):
    code = "from sdpoint_jax.config import default_config\n\n\ndef get_config(seed):\n"
    code += "    config = default_config()\n    config.seed = int(seed)\n    return config\n"
    (tmp_path / "mine.py").write_bytes(code.replace("\n", "\r\n").encode())
    assert config_flag.load_config([f"--config={tmp_path}/mine.py:7"], None).seed == 7


def test_the_folder_of_a_sweep_points_to_its_artefact(tmp_path):
    (tmp_path / "sweep/artefact").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "sweep"):
        with pytest.raises(checkpoint.CheckpointError, match=f"; its artefact is {tmp_path}/sweep/artefact$"):
            artefact.load(path)
