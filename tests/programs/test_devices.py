import concurrent.futures
import gc
import threading
import time

import jax
import numpy as np
import pytest

from sdpoint_jax.models import target
from sdpoint_jax.models.target import Target, programs_for
from sdpoint_jax.programs import devices


@pytest.fixture(autouse=True)
def _fresh_options():
    devices._known_options.cache_clear()
    yield
    devices._known_options.cache_clear()


def test_every_option_is_one_that_this_xla_knows():
    assert devices.compiler_options() == devices._OPTIONS["cpu"]
    jax.jit(lambda x: x + 1).lower(1.0).compile(devices.compiler_options())


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setitem(devices._OPTIONS["cpu"], "xla_cpu_no_such_flag", True)
    assert set(devices._OPTIONS["cpu"]) - set(devices.compiler_options()) == {"xla_cpu_no_such_flag"}


def test_a_flag_of_the_environment_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert set(devices._OPTIONS["cpu"]) - set(devices.compiler_options()) == {"xla_backend_optimization_level"}


@pytest.mark.parametrize("platform, flags", [("gpu", {"xla_gpu_exclude_nondeterministic_ops": True}), ("tpu", {})])
def test_a_gpu_adds_up_in_a_fixed_order_and_a_tpu_gets_no_options_of_ours(monkeypatch, platform, flags):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert devices.compiler_options() == flags


def _mean_and_rows(scale, rows):
    return jax.lax.pmean(rows.sum() * scale, devices.AXIS), {"rows": rows * scale}


def test_an_exported_program_computes_what_the_program_of_one_device_does():
    in_axes, out_axes = (devices.REPLICATED, devices.SHARDED), (devices.REPLICATED, devices.SHARDED)
    with programs_for(Target("cpu")):
        assert devices.device_count() == 1
        shapes = jax.ShapeDtypeStruct((), np.float32), devices.shape_of_shards((3, 2), np.float32)
        exported = devices.parallel(_mean_and_rows, in_axes=in_axes, out_axes=out_axes)(*shapes)
    assert exported.platforms == ("cpu",)
    rows = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    mean, sharded = jax.jit(exported.call)(np.float32(2), rows)
    assert mean == 30
    np.testing.assert_array_equal(sharded["rows"], 2 * rows)


def test_a_target_is_that_of_its_context_and_of_the_switch_that_was_made_in_it():
    def double(x):
        seen.append(target.platform())
        return 2 * x

    seen, shape = [], jax.ShapeDtypeStruct((), np.float32)
    with programs_for(Target("tpu")):
        switch = devices.Switch(lambda key: devices.on_device(double, jax.devices()[0]), lambda key: (shape,))
        assert devices.compiler_options() == {}
    assert target.current() is None and target.platform() == "cpu"
    assert list(switch.compile(["only"])) and seen == ["tpu"]  # In a thread of its own.
    assert switch._programs["only"].platforms == ("tpu",)
    devices.on_device(double, jax.devices()[0])(shape)  # Traced anew, not taken from the trace for the target.
    assert seen == ["tpu", "cpu"]


def test_a_program_for_absent_devices_is_not_kept_on_disk(monkeypatch):
    monkeypatch.setattr(devices.cache, "fetch", lambda *_: pytest.fail("kept"))
    with programs_for(Target.of(tuple(jax.devices()[:2]))):  # Of the same kind as those at hand, so that it compiles.
        assert devices.device_count() == 2
        assert devices.shape_of_shards((6, 5), np.uint8).shape == (2, 3, 5)
        shapes = jax.ShapeDtypeStruct((), np.float32), devices.shape_of_shards((4, 2), np.float32)
        axes = (devices.REPLICATED, devices.SHARDED)
        program = devices.parallel(_mean_and_rows, in_axes=axes, out_axes=axes)(*shapes)
    assert program.memory_analysis().argument_size_in_bytes == 4 + 2 * 2 * 4


class Builds:
    """Builds programs that return their key; that of "late" waits until it is let go."""

    def __init__(self):
        self.begun, self.let_go = [], threading.Event()

    def __call__(self, key):
        self.begun.append(key)
        if key == "late":
            assert self.let_go.wait(20)
        if key == "wrong":
            raise ValueError("too large")
        return lambda: lambda: (key, gc.get_threshold())


def test_programs_compile_in_the_order_of_their_keys_behind_those_that_run():
    builds, before = Builds(), gc.get_threshold()
    switch = devices.Switch(builds, lambda key: ())
    with switch.compile_behind(["first", "late", "last"], workers=1) as compilation:
        assert compilation.wait(["first"], 20) and switch["first"]()[0] == "first"
        assert not compilation.wait(["first", "late"], 0.01) and set(compilation.seconds()) == {"first"}
        assert gc.isenabled() and gc.get_threshold()[0] > before[0]  # While anything is traced.
        builds.let_go.set()
        assert compilation.wait(["last"], 20) and set(compilation.seconds()) == {"first", "late", "last"}
    assert builds.begun == ["first", "late", "last"] and len(compilation) == len(switch) == 3
    assert gc.get_threshold() == before


def test_a_core_is_left_until_the_programs_that_are_needed_first_are_there():
    builds = Builds()
    switch = devices.Switch(builds, lambda key: ())
    with switch.compile_behind(["late", "early", "other", "last"], workers=4, urgent=2) as compilation:
        assert compilation.wait(["early", "other"], 20) and not compilation.wait(["last"], 0.05)
        assert sorted(builds.begun) == ["early", "late", "other"]
        builds.let_go.set()
        assert compilation.wait(["late", "last"], 20)


def test_what_is_not_needed_first_compiles_once_one_of_it_is_waited_for_and_not_by_a_look():
    builds = Builds()
    switch = devices.Switch(builds, lambda key: ())
    with switch.compile_behind(["first", "second", "last"], workers=2, urgent=1) as compilation:
        assert compilation.wait(["first"], 20) and not compilation.wait(["second", "last"], 0)
        time.sleep(0.05)  # The first step may run meanwhile, alone.
        assert builds.begun == ["first"]
        assert compilation.wait(["second"], 20) and compilation.wait(["last"], 20)
    with switch.compile_behind(["third", "fourth"], workers=2, urgent=1) as compilation:
        assert {key for key, _ in compilation} == {"third", "fourth"}


def test_the_options_are_tried_once_however_many_threads_ask(monkeypatch):
    tried = []

    def try_slowly(flag, value):
        tried.append(flag)
        time.sleep(0.01)
        return True

    monkeypatch.setattr(devices, "_is_known", try_slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len({len(found) for found in pool.map(lambda _: devices.compiler_options(), range(4))}) == 1
    assert sorted(tried) == sorted(set(tried))


def test_what_has_not_begun_to_compile_at_the_end_of_the_context_never_does():
    builds = Builds()
    switch = devices.Switch(builds, lambda key: ())
    with switch.compile_behind(["late", "second", "last"], workers=2, urgent=1) as compilation:
        while not builds.begun:  # The second thread waits for the urgent program.
            assert not compilation.wait(["late"], 0.01)
    builds.let_go.set()
    assert switch["late"]()[0] == "late" and builds.begun == ["late"]


def test_a_program_that_does_not_compile_is_named_to_whoever_waits_for_any():
    switch = devices.Switch(Builds(), lambda key: ())
    with (
        switch.compile_behind(["wrong", "right"], 1, name="program {}".format) as compilation,
        pytest.raises(RuntimeError, match="^program wrong does not compile: too large$"),
    ):
        compilation.wait(["right"], 20)
        compilation.wait(["right"], 20)
    with pytest.raises(RuntimeError, match="wrong does not compile: too large"):
        list(switch.compile(["wrong"]))
