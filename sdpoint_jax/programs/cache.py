"""Compiled programs on disk by a description of what they compute: the next start loads them and traces nothing.

JAX's own cache knows a program by its lowered form, so it must be traced and lowered before it is found. Here the
name is a digest of the function, its static arguments and the shapes, of all sources of this package, and of all that
surrounds them: versions, settings, devices. What cannot be described completely is not kept.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import os
import pathlib
import pickle
import platform
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from sdpoint_jax.storage import files

_PACKAGE = pathlib.Path(__file__).parents[1]
_LIBRARIES = ("flax", "jax", "libtpu", "numpy", "nvidia", "optax")
_SETTINGS = ("CUDA_", "LIBTPU_", "NVIDIA_", "TF_", "XLA_")  # Of the environment; JAX's own are in its config.


def fetch(what: Any, compile_it: Callable[[], Callable], devices: Sequence[jax.Device] | None = None) -> Callable:
    """Returns the program of `what`: from disk if it is there, else from `compile_it`, kept for the next time.

    Programs lie beside those that JAX keeps, in `jax_compilation_cache_dir`, however fast they compiled: a service has
    dozens. None is kept without such a folder, if it spans several processes, or if JAX's cache had it: XLA's CPU
    backend loses parts of what it loads and saves.

    Args:
        what: all that the program is made from; see `describe`.
        compile_it: to the `jax.stages.Compiled`.
        devices: that it runs on; all by default.
    """
    path = _path(what)
    if path is None:
        return compile_it()
    if program := _load(path, devices):
        return program
    _from_jax.count = 0
    program = compile_it()
    if not _from_jax.count:
        _keep(path, program)
    return program


def describe(value: Any) -> str:
    """Tells `value` from every other one, in this and in later processes.

    Raises:
        TypeError: it is, or contains, something else than plain values, dtypes, shapes, and functions and dataclasses
            of this package, which the digest of its sources covers; a function inside another one is refused as well.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{describe(key)}: {describe(item)}' for key, item in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"partial{describe((value.func, value.args, value.keywords))}"
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype}{value.shape}"
    if dataclasses.is_dataclass(value) and _is_ours(type(value)):
        names = (field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name"))
        return f"{type(value).__qualname__}{describe({name: getattr(value, name) for name in names})}"
    if inspect.isfunction(value) and _is_ours(value) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, np.dtype) or any(value is dtype for dtype in (jnp.bfloat16, jnp.float32)):
        return np.dtype(value).name
    raise TypeError(f"{value!r}: no description tells it from others")


_from_jax = threading.local()  # `count` of the programs that a thread got from JAX's cache.


def _count_hits(event, **_):
    if event == "/jax/compilation_cache/cache_hits":
        _from_jax.count = getattr(_from_jax, "count", 0) + 1


jax.monitoring.register_event_listener(_count_hits)


def _is_ours(code):
    return (code.__module__ or "").partition(".")[0] == _PACKAGE.name


def _path(what):
    folder = jax.config.jax_compilation_cache_dir
    if not folder or "://" in folder or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    try:
        text = describe(what)
    except TypeError:
        return None
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    digest = hashlib.sha256(f"{_surroundings()}\n{sorted(settings.items())}\n{text}".encode())
    return pathlib.Path(folder, "sdpoint_jax", digest.hexdigest())


@functools.cache
def _surroundings():
    """Digests what is the same for all programs of a process."""
    sources = [(path.relative_to(_PACKAGE).as_posix(), path.read_bytes()) for path in sorted(_PACKAGE.rglob("*.py"))]
    installed = sorted((found.name.lower(), found.version) for found in importlib.metadata.distributions())
    versions = [name_and_version for name_and_version in installed if name_and_version[0].startswith(_LIBRARIES)]
    environment = sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS))
    devices = [(device.id, device.platform, device.device_kind) for device in jax.devices()]
    backend = jax.devices()[0].client.platform_version
    surroundings = (sources, versions, environment, devices, backend, _processor())
    return hashlib.sha256(repr(surroundings).encode()).hexdigest()


def _processor():
    """Names the instructions that this machine has, as programs for a CPU use them all."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def _load(path, devices):
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        found = pickle.loads(zlib.decompress(content))
        return serialize_executable.deserialize_and_load(*found, execution_devices=devices)
    except Exception as error:  # zlib, pickle and XLA have no error in common.
        warnings.warn(f"{path}: not usable, so the program is compiled anew: {error}", stacklevel=2)


def _keep(path, program):
    try:
        content = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), level=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, content)
    except Exception as error:  # Likewise; a run needs no cache. The same words for all programs are shown once.
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        warnings.warn(f"{path.parent}: programs cannot be kept for the next start: {reason}", stacklevel=2)
