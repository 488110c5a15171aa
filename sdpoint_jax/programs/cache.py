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
import pwd
import stat
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
    backend loses parts of what it loads and saves. Loading one may run any code, so only files are loaded that this
    user owns and nobody else may write.

    Args:
        what: all that the program is made from; see `describe`.
        compile_it: to the `jax.stages.Compiled`.
        devices: that it runs on; all by default.
    """
    path = _path(what)
    if path is None:
        return compile_it()
    try:
        content = _read(path)
    except _UntrustedError as error:
        _warn_once(path.parent, error.args[1], error.args[0])
        return compile_it()
    if content is not None and (program := _load(path, content, devices)):
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


def _read(path):
    """Return the content of a file; None if there is none.

    Raises:
        _UntrustedError: somebody else than this user may have written it: loading it may run any code.
    """
    try:
        _check_owner(path.parent, os.stat(path.parent))
        # The file that is checked is the one that is read, and no link to another one.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            _check_owner(path, os.fstat(file.fileno()))
            return file.read()
    except OSError:
        return None


def _check_owner(path, status):
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid():
        raise _UntrustedError(path, f"belongs to {_name_of(status.st_uid)}, not to {_name_of(os.geteuid())}")
    sticky = stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX  # Nobody may replace the files of others in it.
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise _UntrustedError(path, f"others may write to it (mode {mode:o}; chmod go-w makes it private)")


def _name_of(uid):
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


class _UntrustedError(Exception):
    """A file, or its folder, that this user does not own alone; holds the path and the reason."""


@functools.cache
def _warn_once(folder, reason, path):
    del folder
    warnings.warn(f"{path}: {reason}: its programs are compiled instead of loaded", stacklevel=3)


def _load(path, content, devices):
    try:
        program, seal = content[: -len(_seal(path, b""))], content[-len(_seal(path, b"")) :]
        if seal != _seal(path, program):
            raise ValueError("its checksum does not match")
        found = pickle.loads(zlib.decompress(program))
        return serialize_executable.deserialize_and_load(*found, execution_devices=devices)
    except Exception as error:  # zlib, pickle and XLA have no error in common.
        warnings.warn(f"{path}: not usable, so the program is compiled anew: {error}", stacklevel=2)


def _seal(path, program):
    """Return a checksum of a program and of its name, so that none is taken for another one."""
    return hashlib.sha256(path.name.encode() + program).digest()


def _keep(path, program):
    try:
        content = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), level=1)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write_atomically(path, content + _seal(path, content), mode=0o600)
    except Exception as error:  # Likewise; a run needs no cache. The same words for all programs are shown once.
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        warnings.warn(f"{path.parent}: programs cannot be kept for the next start: {reason}", stacklevel=2)
