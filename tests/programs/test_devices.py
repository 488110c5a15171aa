import jax
import pytest

from sdpoint_jax.programs import devices


@pytest.fixture(autouse=True)
def _fresh_options():
    devices.compiler_options.cache_clear()
    yield
    devices.compiler_options.cache_clear()


def test_every_option_is_one_that_this_xla_knows():
    assert devices.compiler_options() == devices._ON_CPU
    jax.jit(lambda x: x + 1).lower(1.0).compile(devices.compiler_options())


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setitem(devices._ON_CPU, "xla_cpu_no_such_flag", True)
    assert set(devices._ON_CPU) - set(devices.compiler_options()) == {"xla_cpu_no_such_flag"}


def test_a_flag_of_the_environment_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert set(devices._ON_CPU) - set(devices.compiler_options()) == {"xla_backend_optimization_level"}


def test_an_accelerator_gets_no_options_of_ours(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert devices.compiler_options() == {}
