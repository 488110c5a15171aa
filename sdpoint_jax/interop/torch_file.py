"""PyTorch's pickled files, read as plain data, without PyTorch.

A pickle names functions to call. Here those that make tensors and dicts are replaced by ours, and everything else, such
as the options of a training script or a learning rate schedule, becomes an `Unknown`, which does nothing: no code of
the file and none of another library runs. Tensors are read when they are asked for, so a file claims no more memory
than the tensors that are used.
"""

import collections
import functools
import io
import math
import mmap
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # Of files of PyTorch before 1.6, which are no zip archives.
_MOST_AXES = 32
_DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}


class Tensor:
    """A tensor in a file; NumPy's `asarray` reads it.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
    """

    def __init__(self, storage: "_Storage", offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        """Check that the tensor lies within its storage, and is not larger.

        Args:
            storage: where the elements are.
            offset: of the first one.
            shape: see the class.
            strides: in elements, for each axis.

        Raises:
            ValueError: it does not.
        """
        whole = (offset, *shape, *strides)
        sound = all(type(number) is int and 0 <= number < 2**63 for number in whole)
        if not sound or len(shape) != len(strides) or len(shape) > _MOST_AXES:
            raise ValueError(f"a tensor with offset {offset}, shape {shape[:9]}, strides {strides[:9]}")
        size, last = math.prod(shape), offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if size and (size > storage.size or last >= storage.size):  # Or a stride of 0 would make much of little.
            raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size} elements")
        self.shape, self.dtype = shape, storage.dtype
        self._storage, self._offset, self._strides = storage, offset, strides

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype or self.dtype)
        flat = self._storage.read()[self._offset :]
        strides = [stride * self.dtype.itemsize for stride in self._strides]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False), dtype)


class Unknown(dict):
    """An object of a class that is not known, or the result of a function: it keeps what is pickled with it.

    Attributes:
        origin: name of the class or function.
        state: what the object's state was, if there is one.
    """

    origin = "?"
    state: Any = None

    def __init__(self, *_: Any, **__: Any):
        """Ignore the arguments."""

    def __call__(self, *_: Any, **__: Any) -> "Unknown":
        """Stand for the result of a call."""
        return type(self)()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, _: Any) -> None:
        """Ignore an element."""

    add = extend = append


def load(path: str | os.PathLike) -> Any:
    """Read what `torch.save` wrote to the file `path`, with a `Tensor` for each tensor.

    Raises:
        ValueError: it is damaged, or not such a file.
        OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _load_archive(path)
        with path.open("rb") as file:
            return _load_stream(file, path)
    except OSError:
        raise
    except Exception as error:  # Damage shows in many types: pickle's, zipfile's, struct's, EOFError, RecursionError.
        raise ValueError(f"{path}: damaged, or not written by torch.save: {type(error).__name__} {error}") from error


def state_dict_of(module: Unknown) -> dict[str, Tensor]:
    """Collect the tensors of a whole pickled module by their names; empty if it is another object."""
    found: dict[str, Tensor] = {}
    state = module.state if isinstance(module.state, Mapping) else {}
    for kind in ("_parameters", "_buffers"):
        tensors = state.get(kind)
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else ():
            if isinstance(tensor, Tensor):
                found[name] = tensor
    inner = state.get("_modules")
    for name, child in inner.items() if isinstance(inner, Mapping) else ():
        if isinstance(child, Unknown):
            found |= {f"{name}.{rest}": tensor for rest, tensor in state_dict_of(child).items()}
    return found


class _StorageType:
    """What a pickle calls a storage of one type of elements."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: Any):
        self.dtype = np.dtype(dtype)


class _Storage:
    """The elements of one or more tensors."""

    def __init__(self, dtype: np.dtype, size: int, read: Callable[[], bytes]):
        if type(size) is not int or not 0 <= size < 2**63:
            raise ValueError(f"a storage of {size} elements")
        self.dtype, self.size, self._read = dtype, size, read

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return np.frombuffer(self._read(), self.dtype, self.size)


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if isinstance(storage, Unknown):  # Of a type that NumPy does not have, such as quantised ones.
        return Unknown()
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _first(value, *_):
    return value


def _rebuild_from_type(function, _, arguments, *__):
    """Make the tensor of a subclass of PyTorch's tensors."""
    return function(*arguments) if function is _rebuild_tensor else Unknown()


def _make_dict(*_):
    return {}


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _make_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch.nn.parameter", "Parameter"): _first,
}


# Python's unpickler, not the one in C, which reserves as much memory as a single number in the pickle tells it to.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    # Without the one operation that reserves memory before it reads; torch.save does not use it.
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, file, open_storage):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")  # For strings of Python 2.
        self._open_storage = open_storage

    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        return _KNOWN.get((module, name)) or type(name, (Unknown,), {"origin": f"{module}.{name}"})

    def persistent_load(self, reference):
        return self._open_storage(reference)


def _open_storage(reference, read):
    """Return the storage that a pickle refers to, and its key; an `Unknown` if it is of another kind."""
    kind, *rest = reference
    if kind != "storage":  # A class with its source, which older files have.
        return rest[0], None
    storage_type, key, _, size, *view = rest
    if not isinstance(storage_type, _StorageType) or not isinstance(storage_type.dtype, np.dtype) or any(view):
        return Unknown(), key
    return _Storage(storage_type.dtype, size, functools.partial(read, key)), key


def _load_archive(path):
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("no data.pkl in it")
        if f"{root}constants.pkl" in sizes:
            raise ValueError("a TorchScript program; save its state_dict() instead")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("compressed, so it may be of any size")
        if f"{root}byteorder" in sizes and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("not of little-endian byte order")
        pickled = archive.read(f"{root}data.pkl")

    @functools.lru_cache(1)  # Tensors that share a storage mostly follow each other.
    def read(key):
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.read(f"{root}data/{key}")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: damaged: {error}") from error

    def open_storage(reference):
        storage, key = _open_storage(reference, read)
        if isinstance(storage, _Storage) and storage.num_bytes > sizes[f"{root}data/{key}"]:
            raise ValueError(f"storage {key} is cut off")
        return storage

    return _Unpickler(io.BytesIO(pickled), open_storage).load()


def _load_stream(file, path):
    """Read a file of PyTorch before 1.6: pickles, the last two the content and the order of the storages after them."""
    # Of a map, a length in a pickle never makes `read` reserve more than the file has.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        if [_Unpickler(stream, _refuse).load() for _ in range(2)] != [_MAGIC, _PROTOCOL]:
            raise ValueError("no magic number in it")
        _Unpickler(stream, _refuse).load()  # Of the system that wrote it.
        offsets: dict[str, int] = {}
        storages: dict[str, _Storage] = {}

        def read(key):
            with path.open("rb") as again:
                again.seek(offsets[key])
                return again.read(storages[key].num_bytes)

        def open_storage(reference):
            storage, key = _open_storage(reference, read)
            if isinstance(storage, _Storage):
                storages[key] = storage
            return storage

        content = _Unpickler(stream, open_storage).load()
        for key in _Unpickler(stream, _refuse).load():
            (size,) = struct.unpack("<q", stream.read(8))
            if size != storages[key].size:
                raise ValueError(f"storage {key} has {size} elements, not {storages[key].size}")
            offsets[key] = stream.tell()
            stream.seek(storages[key].num_bytes, os.SEEK_CUR)  # Fails beyond the end.
    return content


def _refuse(_):
    raise ValueError("a storage where none belongs")
