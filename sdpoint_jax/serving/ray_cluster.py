"""The Ray cluster that a command uses. Needs the extra `ray`."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray import serve  # noqa: F401  Both set the levels of their loggers when they are imported.


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names; without it, to one on this machine, which ends with this.

    To be called before the process uses JAX, as Ray forks. From then on it computes on its CPU alone: accelerators are
    left to Ray's workers.

    Raises:
        ConnectionError: there is no cluster at RAY_ADDRESS.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(address=address or "local", logging_level="error", log_to_driver=False, **local)
    for name in ("ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def count_devices() -> tuple[str, int]:
    """Returns what Ray calls the cluster's accelerators, `GPU` or `TPU`, and their number; without any, `CPU` and the
    number of machines.
    """
    resources = ray.cluster_resources()
    for kind in ("GPU", "TPU"):
        if resources.get(kind):
            return kind, int(resources[kind])
    return "CPU", sum(node["Alive"] for node in ray.nodes())
