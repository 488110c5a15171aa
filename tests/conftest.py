"""Eight virtual CPU devices, strict JAX, and a compilation cache that outlives the run."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def swept(tmp_path_factory):
    """The sweep of all seven instances of the tiny net: its folder, its table, experiment and parameters."""
    import tiny

    return tiny.sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="session")
def served(swept, tmp_path_factory):
    """The path of the same artefact, profiled; for those who do not change it."""
    import services

    from sdpoint_jax.storage import artefact

    path = tmp_path_factory.mktemp("served") / "artefact"
    artefact.save(services.with_latencies(artefact.load(swept.folder / "artefact")), path)
    return path
