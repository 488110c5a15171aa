"""The Ray cluster that a command uses. Needs the extra `ray`."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names; without it, to one of its own on this machine, on loopback, which
    ends with it.

    To be called before the process uses JAX, as Ray forks. From then on it computes on its CPU alone: accelerators are
    left to Ray's workers.

    Raises:
        ConnectionError: there is no cluster at RAY_ADDRESS.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    for name in ("ray", "ray.data", "ray.serve"):  # What they tell of their own course is in Ray's log files.
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(address=address or "local", logging_level="error", log_to_driver=False, **({} if address else local))
    try:
        yield
    finally:
        ray.shutdown()


def count_accelerators() -> tuple[str, int]:
    """Returns what Ray calls the cluster's accelerators, `GPU` or `TPU`, and their number; without any, `CPU` and the
    number of machines.
    """
    resources = ray.cluster_resources()
    for kind in ("GPU", "TPU"):
        if resources.get(kind):
            return kind, int(resources[kind])
    return "CPU", sum(node["Alive"] for node in ray.nodes())
