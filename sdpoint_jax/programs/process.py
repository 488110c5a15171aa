"""What a process sets for JAX, before it imports it."""

import os
import pathlib


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs for the next start, unless the environment says where, or that it should not."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "sdpoint_jax", "xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
