"""How the device at hand is named where measurements are kept, and how many threads it computes in."""

import contextlib
import functools
import os
import pathlib
import platform
import re
from typing import Any


def describe_device(device: Any = None) -> str:
    """Names a device of JAX, by default the first of this host, as `gpu: NVIDIA H100 80GB HBM3`.

    A CPU is named with the threads that a program runs in, as `cpu: AMD EPYC 7763, 2 threads`; see `count_threads`.
    """
    if device is None:
        import jax  # Late: what reads a table needs none.

        device = jax.local_devices()[0]
    if device.platform != "cpu":
        return f"{device.platform}: {device.device_kind}"
    threads = count_threads()
    return f"cpu: {_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def count_threads() -> int:
    """Counts the threads that a program runs in on a CPU: as many as this process may use cores.

    XLA may be told otherwise, by `NPROC` or in `XLA_FLAGS`; then so is every other runtime.
    """
    if re.search(r"xla_cpu_multi_thread_eigen=(false|0)\b", os.environ.get("XLA_FLAGS", "")):
        return 1
    if (given := os.environ.get("NPROC", "")).isdecimal():  # XLA reads it as well.
        return max(1, int(given))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _processor_name():
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.*\S)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine() or "unknown"
