"""The host's memory, where programs compute in it."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets a process that computes on the CPU keep the memory that a step frees, for the next step.

    By default glibc returns it to the kernel, which then clears it page by page for every step anew: up to a third of
    a training step. To be called before the first thread starts. Does nothing with an accelerator, with another C
    library, or where the environment tunes malloc itself.
    """
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if tuned or platform.libc_ver()[0] != "glibc" or _may_have_accelerator():
        return
    libc = ctypes.CDLL(None)
    # All memory from one heap that never shrinks: what is mapped by itself, or another heap, is given back.
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
        libc.mallopt(option, value)


def _may_have_accelerator():
    """Tells whether JAX may find one, as far as that can be told without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms != "cpu"
    return bool(importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"))
