"""Latency is timed in turns, with no call lost or counted twice, and goes on after an interruption."""

import dataclasses
import gc
import json
import os
import shutil
import statistics
import time

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpoint_jax.choice.table import Latency
from sdpoint_jax.config import to_dict
from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.profiling import latency
from sdpoint_jax.profiling.latency import Effort, Program, Runtime, measure
from sdpoint_jax.profiling.memory import planned_memory
from sdpoint_jax.storage import artefact, checkpoint
from sdpoint_jax.storage.device import describe_device
from sdpoint_jax.storage.lock import FolderLock


class FakeMachine:
    """A clock that only calls move, by so many seconds each, and a record of the calls."""

    def __init__(self, **seconds):
        self.now, self.called = 0.0, []
        self.targets = {name: lambda name=name: self._call(name, seconds[name]) for name in seconds}
        self.slowdown = lambda now: 1

    def _call(self, name, seconds):
        self.called.append(name)
        self.now += seconds * self.slowdown(self.now)

    def measure(self, effort, turns=None):
        turns = {} if turns is None else turns
        order = list(measure(self.targets, effort, turns, clock=lambda: self.now))
        return order, {name: [seconds for turn in turns[name] for seconds in turn] for name in turns}


def test_each_target_is_called_as_often_as_asked_and_once_more_each_turn():
    machine = FakeMachine(fast=0.001, slow=0.002)
    order, seconds = machine.measure(Effort(repeats=25, rounds=10))
    assert {name: len(timed) for name, timed in seconds.items()} == {"fast": 25, "slow": 25}
    assert seconds["slow"] == pytest.approx([0.002] * 25)
    assert len(order) == 20 and len(machine.called) == 2 * 25 + 20
    assert len(FakeMachine(fast=0.001).measure(Effort(repeats=3, rounds=10))[0]) == 3


def test_the_first_call_of_a_turn_does_not_count():
    now, calls = [0.0], []

    def cold_at_first():
        now[0] += 1.0 if len(calls) % 3 == 0 else 0.001
        calls.append(now[0])

    turns = {}
    for _ in measure({"target": cold_at_first}, Effort(repeats=4, rounds=2), turns, clock=lambda: now[0]):
        pass
    assert turns["target"] == [pytest.approx([0.001, 0.001])] * 2


def test_all_targets_take_turns_in_an_order_that_the_seed_draws():
    names = [f"p{k}" for k in range(8)]
    machine = FakeMachine(**dict.fromkeys(names, 0.001))
    order, _ = machine.measure(Effort(repeats=5, rounds=5, seed=1))
    rounds = [order[start : start + 8] for start in range(0, 40, 8)]
    assert all(sorted(found) == names for found in rounds)
    assert len(set(map(tuple, rounds))) == 5
    assert order == machine.measure(Effort(repeats=5, rounds=5, seed=1))[0]
    assert order != machine.measure(Effort(repeats=5, rounds=5, seed=2))[0]


def test_a_machine_that_slows_down_does_so_for_all():
    machine = FakeMachine(a=0.001, b=0.002, c=0.004)
    machine.slowdown = lambda now: 1 + now  # More than twice as slow at the end.
    _, seconds = machine.measure(Effort(repeats=100))
    assert machine.slowdown(machine.now) > 2
    medians = {name: statistics.median(timed) for name, timed in seconds.items()}
    assert medians["b"] / medians["a"] == pytest.approx(2, rel=0.05)
    assert medians["c"] / medians["a"] == pytest.approx(4, rel=0.05)


def test_a_slow_target_is_called_less_often_but_five_times():
    machine = FakeMachine(slow=10.0, medium=0.15, fast=0.001)
    _, seconds = machine.measure(Effort(repeats=100, seconds=2.0))
    assert {name: len(timed) for name, timed in seconds.items()} == {"slow": 5, "medium": 14, "fast": 100}


def test_no_garbage_is_collected_during_a_turn():
    enabled = []
    for _ in measure({"target": lambda: enabled.append(gc.isenabled())}, Effort(repeats=2, rounds=1), {}):
        assert gc.isenabled()
    assert enabled == [False] * 3


def test_percentiles_are_those_of_all_calls():
    turns = [[k / 1000 for k in range(1, 51)], [], [k / 1000 for k in range(51, 101)]]
    assert latency.summarize(turns) == (50.5, 95.0, 100)
    assert latency.summarize([[0.003]]) == (3.0, 3.0, 1)


@pytest.mark.parametrize("values", [{"repeats": 0}, {"rounds": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_an_effort_of_nothing_is_refused(values):
    [(name, value)] = values.items()
    with pytest.raises(ValueError, match=f"{name} {value}: "):
        Effort(**values)


class FakeRuntime:
    """Counts the calls of its programs; from call `stop_at` on, the user interrupts."""

    def __init__(self, stop_at=10**9, compile_seconds=1.5, device="gpu: fake"):
        self.calls, self._stop_at, self._compile_seconds = 0, stop_at, compile_seconds
        self.runtime = Runtime("xla", device, "float32", (4, 4, 1), {"jax": "1"}, self._prepare)

    def _prepare(self, instance, batch_size):
        def run(images):
            assert images.shape == (batch_size, 4, 4, 1) and images.dtype == np.uint8
            self.calls += 1
            if self.calls == self._stop_at:
                raise KeyboardInterrupt
            return np.zeros((batch_size, 10), np.float32)

        return Program(run, 1000 * batch_size, self._compile_seconds)

    def profile(self, path, of="net", **effort):
        instances = [FULL_RESOLUTION, SDPointInstance(1, 0.5)]
        effort = Effort(**{"repeats": 8, "rounds": 4} | effort)
        return latency.profile([self.runtime], instances, [1, 3], effort, unfinished=path, of=of)


def test_a_profile_has_a_latency_for_each_instance_and_batch_size(tmp_path):
    fake = FakeRuntime()
    found = fake.profile(tmp_path / "unfinished")
    assert {instance.name: [row.batch_size for row in rows] for instance, rows in found.items()} == {
        "full": [1, 3],
        "p01_r0.50": [1, 3],
    }
    row = found[FULL_RESOLUTION][1]
    assert row.setting == ("gpu: fake", "xla", "float32", 3)
    assert (row.repeats, row.peak_memory_bytes, row.compile_seconds, row.versions) == (8, 3000, 1.5, {"jax": "1"})
    assert 0 < row.p50_ms <= row.p95_ms
    assert fake.calls == 4 * (8 + 4)


def test_an_interrupted_profile_goes_on(tmp_path):
    path, whole = tmp_path / "unfinished", 4 * (8 + 4)
    interrupted = FakeRuntime(stop_at=25)
    with pytest.raises(KeyboardInterrupt):
        interrupted.profile(path)
    before = json.loads(path.read_bytes())["turns"]
    second = FakeRuntime(compile_seconds=None)  # A cache has the programs by now.
    found = second.profile(path)
    assert second.calls == whole - 24
    assert all(row.compile_seconds == 1.5 and row.repeats == 8 for rows in found.values() for row in rows)
    after = json.loads(path.read_bytes())["turns"]
    assert all(after[name][: len(turns)] == turns for name, turns in before.items())


@pytest.mark.parametrize("change", [{"seed": 1}, {"of": "other"}, {"device": "gpu: other"}, {"damage": True}])
def test_measurements_of_something_else_are_discarded(tmp_path, change):
    path, change = tmp_path / "unfinished", dict(change)
    FakeRuntime().profile(path)
    if change.pop("damage", False):
        path.write_bytes(path.read_bytes()[:-9])
    device = change.pop("device", "gpu: fake")
    fake = FakeRuntime(device=device)
    fake.profile(path, **change)
    assert fake.calls == 4 * (8 + 4)


def test_a_file_of_others_is_not_taken_for_measurements(tmp_path):
    (tmp_path / "unfinished").write_text('{"notes": "dear"}')
    with pytest.raises(ValueError, match=f"^{tmp_path}/unfinished: was not written by a profile"):
        FakeRuntime().profile(tmp_path / "unfinished")
    assert (tmp_path / "unfinished").read_text() == '{"notes": "dear"}'


def test_only_what_xla_compiles_has_seconds_of_compiling():
    unique = float(time.time_ns() % 10**9)  # So that no cache has it.

    def compile_it():
        jax.jit(lambda x: x * unique).lower(jnp.ones(3)).compile()

    assert latency.time_compilation(compile_it) > 0
    assert latency.time_compilation(compile_it) is None  # JAX's cache on disk has it.
    assert latency.time_compilation(lambda: None) is None


def test_the_planned_memory_is_that_of_arguments_outputs_and_temporaries():
    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(lambda x, y: jnp.sin(x @ y) @ x).lower(shape, shape).compile()
    plan = program.memory_analysis()
    assert planned_memory(program) == 3 * 64 * 64 * 4 + plan.temp_size_in_bytes
    assert planned_memory(lambda x: x) is None


def measured(device, batch_size=1, **values):
    fields = dict(p50_ms=2.0, p95_ms=3.0, repeats=9, peak_memory_bytes=None, compile_seconds=None, versions={})
    return Latency(device, "xla", "float32", batch_size, **fields | values)


@pytest.mark.parametrize("load, warns", [(0.2, False), (1.3, True)])
def test_a_busy_machine_is_a_line(monkeypatch, capsys, load, warns):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    latency.warn_of_load()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == warns and all("load average 1.3: other processes run" in line for line in lines)


def test_a_measurement_replaces_that_of_the_same_setting_and_keeps_the_seconds_of_compiling():
    first, other = measured("gpu: a", p50_ms=2.0, compile_seconds=7.0), measured("gpu: b")
    row = tiny.row("full", 100, 0.9).with_latency(first).with_latency(other)
    again = row.with_latency(measured("gpu: a", p50_ms=1.0))
    assert [(found.device, found.p50_ms) for found in again.latencies] == [("gpu: b", 2.0), ("gpu: a", 1.0)]
    assert again.latency(first.setting).compile_seconds == 7.0
    newer = row.with_latency(measured("gpu: a", versions={"jax": "2"}))
    assert newer.latency(first.setting).compile_seconds is None
    assert newer.latency(("gpu: c", *first.setting[1:])) is None


@pytest.fixture
def sweep_folder(swept, tmp_path):
    shutil.copytree(swept.folder, tmp_path / "sweep")
    return tmp_path / "sweep"


def test_the_command_puts_latencies_into_the_artefact_and_the_files_of_the_sweep(sweep_folder, swept, capsys):
    path, device = sweep_folder / "artefact", describe_device()
    commands.run("profile", path, "--batch-sizes=2,1", "--repeats=2", "--runtime=xla")
    rows = artefact.load(path).rows
    assert [dataclasses.replace(row, latencies=()) for row in rows] == list(swept.rows)
    settings = [(device, "xla", "float32", size) for size in (1, 2)]
    assert all([found.setting for found in row.latencies] == settings for row in rows)
    assert all(found.repeats == 2 and 0 < found.p50_ms <= found.p95_ms for row in rows for found in row.latencies)
    assert {"jax", "jaxlib", "numpy"} <= rows[0].latencies[0].versions.keys()
    written = json.loads((sweep_folder / "sweep.json").read_text())["instances"][1]
    assert written["latencies"][0]["p50_ms"] == rows[1].latencies[0].p50_ms
    assert f"{device} | xla | float32 | batch 2 | p50_ms" in (sweep_folder / "sweep.csv").read_text()
    assert (sweep_folder / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert not list(sweep_folder.glob("*profiling*"))
    assert f"latency on {device}" in capsys.readouterr().out

    commands.run("profile", path, "--batch-sizes=2", "--repeats=1", "--instances=p02_r0.50", "--runtime=xla")
    again = artefact.load(path).rows
    repeats = {row.name: [row.latency(setting).repeats for setting in settings] for row in again}
    assert repeats == {row.name: [2, 1 if row.name in ("full", "p02_r0.50") else 2] for row in rows}


def test_an_artefact_by_itself_is_profiled_too(sweep_folder, tmp_path):
    (sweep_folder / "artefact").rename(tmp_path / "mine")
    commands.run("profile", tmp_path / "mine", "--batch-sizes=1", "--repeats=1", "--instances=pareto", "--runtime=xla")
    rows = artefact.load(tmp_path / "mine").rows
    assert rows[0].latencies and 0 < sum(not row.latencies for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "mine", "sweep"]


def test_both_runtimes_are_measured_in_turns_and_the_faster_one_is_named(sweep_folder, capsys):
    pytest.importorskip("onnxruntime")
    path, device = sweep_folder / "artefact", describe_device()
    commands.run("profile", path, "--batch-sizes=1,3", "--repeats=2", "--instances=p01_r0.50")
    out = capsys.readouterr().out
    assert "onnxruntime, float32" in out and "xla, float32" in out and "a predictor uses " in out
    measured = [row for row in artefact.load(path).rows if row.latencies]
    assert [row.name for row in measured] == ["full", "p01_r0.50"]
    settings = {(device, runtime, "float32", size) for runtime in ("xla", "onnxruntime") for size in (1, 3)}
    assert all({found.setting for found in row.latencies} == settings for row in measured)
    versions = measured[0].latency((device, "onnxruntime", "float32", 1)).versions
    assert "onnxruntime" in versions and "jax" not in versions
    commands.run("select", path, "--max-latency-ms=1e6")
    assert commands.error_of(capsys, "profile", path, "--runtime=tvm") == (
        "error: --runtime=tvm: valid are all, xla, onnxruntime\n"
    )


def test_evaluate_ends_with_a_profile(swept, tmp_path, capsys):
    checkpoint.save(tmp_path / "run", {"params": swept.params}, {"config": to_dict(swept.experiment.config)})
    output = tmp_path / "sweep"
    arguments = [f"--workdir={tmp_path / 'run'}", f"--output={output}", "--instances=full,p01_r0.50"]
    assert "--profile=0: give batch sizes from 1 on" in commands.error_of(capsys, "evaluate", *arguments, "--profile=0")
    assert not output.exists()
    commands.run("evaluate", *arguments, "--profile=4")
    rows = artefact.load(output / "artefact").rows
    assert [{found.batch_size for found in row.latencies} for row in rows] == [{4}] * 2
    assert (output / "latency.png").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}/nowhere"], "nowhere: no such checkpoint"),
        (["{}/artefact", "--batch-sizes=0,4"], "--batch-sizes=0,4: give batch sizes from 1 on, with commas between"),
        (["{}/artefact", "--batch-sizes=-1"], "--batch-sizes=-1: give batch sizes from 1 on"),
        (["{}/artefact", "--batch-sizes="], "--batch-sizes=: give batch sizes from 1 on"),
        (["{}/artefact", "--batch-sizes=big"], "--batch-sizes=big: give numbers with commas between them"),
        (["{}/artefact", "--instances=half"], "instance name 'half': valid are full"),
        (["{}/artefact", "--instances=p99_r0.50"], "instance p99_r0.50: its statistics were not re-estimated; the art"),
        (["{}/artefact", "--repeats=0"], "repeats 0: at least 1"),
        (["{}/artefact", "--seconds=-1"], "seconds -1.0: a positive, finite number"),
    ],
)
def test_bad_input_is_one_line(swept, capsys, arguments, message):
    assert message in commands.error_of(capsys, "profile", *(a.replace("{}", str(swept.folder)) for a in arguments))


def test_a_folder_that_is_written_to_is_left_alone(sweep_folder, capsys):
    with FolderLock(sweep_folder, "output folder"):
        error = commands.error_of(capsys, "profile", sweep_folder / "artefact", "--batch-sizes=1")
    assert f"folder {sweep_folder}: in use by another run" in error
