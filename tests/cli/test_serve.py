"""A service measures the latencies that its artefact lacks before it starts."""

import os
import shutil

import commands
import pytest
import services

from sdpoint_jax.cli import profile
from sdpoint_jax.serving import service
from sdpoint_jax.storage import artefact
from sdpoint_jax.storage.device import describe_device


@pytest.fixture
def path(swept, tmp_path):
    """A copy of the artefact, without latencies."""
    return shutil.copytree(swept.folder / "artefact", tmp_path / "artefact")


def measure(path, instances, sizes=(1,)):
    """Returns what was measured, by instance and batch size, and what was said."""
    said = []
    found = profile.measure_missing(artefact.load(path), path, instances, sizes, runtime="xla", say=said.append)
    assert {latency.device for row in found.rows for latency in row.latencies} <= {describe_device(), "cpu"}
    return {(row.name, latency.batch_size) for row in found.rows for latency in row.latencies}, said


def test_what_is_missing_is_measured_and_kept(path):
    unfinished = artefact.unfinished_profile(path)
    unfinished.write_text('{"key": "of a profile that was interrupted"}')
    found, said = measure(path, "p01_r0.50")
    assert found == {("p01_r0.50", 1)} and unfinished.exists()
    assert f"not measured yet on {describe_device()}: 1 of 7 instances at batch sizes 1; measuring" in said[0]
    assert f"written into the table of {path}" in said[1]
    assert measure(path, "p01_r0.50") == (found, [])
    assert measure(path, "pareto") == (found, [])  # Chosen by the profile, whatever that holds.
    found, said = measure(path, "p01_r0.50,p01_r0.75", ())
    assert found == {("p01_r0.50", 1), ("p01_r0.75", 1)} and "1 of 7 instances" in said[0]


def test_where_the_folder_is_read_only_the_latencies_are_used_all_the_same(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(path.parent.rglob("*"))
    found, said = measure(path, "p01_r0.50")
    assert found == {("p01_r0.50", 1)} and "not kept" in said[1]
    assert sorted(path.parent.rglob("*")) == before
    assert not any(row.latencies for row in artefact.load(path).rows)


@pytest.fixture
def started(monkeypatch):
    """The artefacts that services were started with; they end at once."""
    given = []

    def make_app(settings, *, swept, **_):
        given.append(swept)
        raise ValueError("started")

    monkeypatch.setattr(service, "make_app", make_app)
    return given


def test_the_command_measures_first_and_starts_with_the_latencies(path, started, monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    calls = []

    def measured(swept, *arguments, **settings):
        calls.append((*arguments, settings["runtime"]))
        return services.with_latencies(swept)

    monkeypatch.setattr(profile, "measure_missing", measured)
    command = ["serve", path, "--port=0", "--instances=all", "--batch-sizes=4,8", "--runtime=xla"]
    assert commands.error_of(capsys, *command) == "error: started\n"
    assert calls == [(str(path), "all", (4, 8), "xla")] and started[0].rows[0].latencies
    assert commands.error_of(capsys, *command, "--profile=no") == "error: started\n"
    assert commands.error_of(capsys, *command, "--device=other") == "error: started\n"
    assert len(calls) == 1 and started[1:] == [None, None]


def test_without_a_profile_the_command_says_what_to_run(path, capsys):
    pytest.importorskip("uvicorn")
    message = commands.error_of(capsys, "serve", path, "--port=0", "--profile=no")
    assert "not measured on any device; run: python -m sdpoint_jax profile ARTEFACT" in message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--profile=never", "--profile=never: valid are auto, no"),
        ("--policy=fast", "policy 'fast'"),
        ("--objective-ms=0", "objective 0.0"),
        ("--instances=p09_r0.50", "instance 'p09_r0.50'"),
        ("--batch-sizes=0", r"batch_sizes [0]: each at least 1"),
        ("--runtime=tvm", "runtime 'tvm': valid are auto, xla, onnxruntime"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_is_measured(path, capsys, monkeypatch, flag, message):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(profile, "measure_missing", lambda *_, **__: pytest.fail("measured"))
    assert message in commands.error_of(capsys, "serve", path, "--port=0", flag)
