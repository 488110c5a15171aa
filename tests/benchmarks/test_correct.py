"""The check of a device: a net that computes what it should passes, and one that does not is named."""

import sys

import correct
import pytest


def check(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["correct.py", "--nets=resnet20", "--kills=0", *flags])
    correct.main()


def test_known_logits_pass_and_are_kept(monkeypatch, tmp_path, capsys):
    check(monkeypatch, f"--json={tmp_path}/correct.json")
    assert "resnet20" in capsys.readouterr().out and '"p04_r0.50"' in (tmp_path / "correct.json").read_text()


def test_other_logits_are_named_with_their_net_and_instance_and_end_with_code_1(monkeypatch):
    rounded = dict(correct.LIMITS, float32=1e-9)
    monkeypatch.setattr(correct, "LIMITS", rounded)
    with pytest.raises(SystemExit, match="wrong: resnet20 full float32: ") as end:
        check(monkeypatch)
    assert "bfloat16" not in str(end.value)


def test_a_run_that_ended_with_other_bits_is_named(monkeypatch):
    def differs(*_, **__):
        raise RuntimeError("run0: differs from whole in params/stem")

    monkeypatch.setattr(correct.soak, "soak", differs)
    monkeypatch.setattr(correct, "deviations", lambda name, dtype: {"full": 0.0})
    with pytest.raises(SystemExit, match="wrong: run0: differs from whole in params/stem"):
        check(monkeypatch, "--kills=1")
