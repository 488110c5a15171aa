"""evaluate.py on imported weights, which know their net."""

import commands
import pytest
import tiny

from sdpoint_jax.evaluation import sweep
from sdpoint_jax.storage import checkpoint
from sdpoint_jax.training.plan import Plan


@pytest.fixture
def imported(tmp_path):
    """Weights of a net that is not the one of configs/folder.py."""
    variables = tiny.variables(tiny.net())
    checkpoint.save(tmp_path / "imported", variables, {"model": {"name": "wrn10_1"}, "format": 2})
    return tmp_path / "imported"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # Of ml_collections, which runs a config.
def test_imported_weights_are_evaluated_as_the_net_that_they_are(imported, monkeypatch, capsys):
    nets = []

    def note(experiment, *args, **kwargs):
        nets.append(experiment.config.model.name)
        raise ValueError("enough")

    monkeypatch.setattr(sweep, "sweep", note)
    flags = [f"--workdir={imported}", "--config=digits", "--config.dataset.image_size=8,8", "--statistics=imported"]
    assert "enough" in commands.error_of(capsys, "evaluate", *flags)
    assert nets == ["wrn10_1"]
    # Asked for explicitly, another net is a mistake.
    assert "does not fit wrn10_2" in commands.error_of(capsys, "evaluate", *flags, "--config.model.name=wrn10_2")


def test_imported_weights_are_trained_as_the_net_that_they_are(imported):
    config = tiny.config(init_from=str(imported))
    config.model.name = "auto"
    assert Plan(config).config.model.name == "wrn10_1" and config.model.name == "auto"


def test_a_net_that_nothing_names_is_asked_for(tmp_path):
    config = tiny.config()
    config.model.name = "auto"
    with pytest.raises(ValueError, match="config.model.name auto: the net of config.init_from, which is empty"):
        Plan(config)
    checkpoint.save(tmp_path / "x", {"params": {}} | tiny.variables(tiny.net()), {"note": "?"})
    config.init_from = str(tmp_path / "x")
    with pytest.raises(ValueError, match="x does not say which net it is; name it"):
        Plan(config)
