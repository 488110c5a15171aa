"""Devices are named so that measurements of one are told from those of another."""

import os
from types import SimpleNamespace

from sdpoint_jax.storage import device


def test_a_device_is_named_with_its_threads(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    threads = len(os.sched_getaffinity(0))
    assert device.describe_device().startswith("cpu: ")
    assert device.describe_device().endswith(f", {threads} thread" + "s" * (threads > 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert device.describe_device().endswith(", 3 threads")
    monkeypatch.setenv("NPROC", "12")
    assert device.describe_device().endswith(", 12 threads")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    assert device.describe_device().endswith(", 1 thread")
    assert device.describe_device(SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")) == "gpu: NVIDIA H100"
