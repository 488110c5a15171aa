"""PyTorch weights of the authors' release and of torchvision, as variables of our nets.

    python -m sdpoint_jax import checkpoint.pth.tar --model=preresnet101 --output=runs/preresnet101

Both name their tensors alike, and so does timm: `conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, `fc`, and
`bn2` for the last BatchNorm of a pre-activation net. Other names are brought to these by renaming parts of them, as
`linear` to `fc`. What wraps the net in a file, such as `module.` of parallel training, is found and dropped.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpoint_jax.interop import torch_file
from sdpoint_jax.models.net import SDPointNet, TorchTensor
from sdpoint_jax.models.registry import create_model

_PICKLED = (".pth.tar", ".pth", ".pt", ".th", ".bin", ".ckpt")
_SAFE = ".safetensors"
_DEPTH = 2  # How many keys a state dict may lie below.
# Where training scripts keep the net among other state dicts, the likeliest first.
_KEYS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "params", "weights")
# First parts of names that stand beside those of a net: of losses, metrics, averages, teachers.
_ASIDE = re.compile(r"n_averaged|(\w+_)?(criterion|loss|loss_fn|metrics?|accuracy|teacher|ema)(_\w+)?[0-9]*")
DIALECTS = ("torchvision", "timm")

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# From PyTorch's axes (OIHW, OI) to ours (HWIO, IO).
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


class _Tensor(NamedTuple):
    """What one PyTorch tensor has to be, and where it goes."""

    shape: tuple[int, ...]
    path: tuple[str, ...]
    ours: tuple[int, ...] | None = None  # Shape of our variable, of the same order of axes; None for a layer's.


def import_torch_state_dict(
    state_dict: Mapping[str, Any], model: SDPointNet, *, channels: int = 3, reset_head: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Makes the variables of `model` with the weights and statistics of a PyTorch state dict.

    Args:
        state_dict: PyTorch's names to arrays (NumPy's, or PyTorch's tensors) of any float type. What is
            dropped says `unwrap`; `num_batches_tracked` is ignored.
        model: the same net here.
        channels: of the images.
        reset_head: draw a new classifier instead of importing one, as for another number of classes.
        seed: of that draw.

    Returns:
        {"params", "batch_stats"}: nested dicts of float32 NumPy arrays.

    Raises:
        ValueError: tensors are missing, surplus, of a wrong shape or type, or not finite; names all of them.
    """
    known = [torch_tensors(model, channels, dialect) for dialect in DIALECTS]
    state_dict, _ = unwrap(state_dict, itertools.chain(*known))
    wanted = max(known, key=lambda tensors: len(state_dict.keys() & tensors))
    head = {name for name, tensor in wanted.items() if "/".join(tensor.path[1:-1]) == model.classifier}
    if reset_head:
        wanted = {name: tensor for name, tensor in wanted.items() if name not in head}
        state_dict = {name: array for name, array in state_dict.items() if name not in head}
    fitting = [
        name for name in sorted(wanted) if name in state_dict and np.shape(state_dict[name]) == wanted[name].shape
    ]
    arrays = {name: _float32(state_dict[name]) for name in fitting}  # Tensors of other shapes are not even read.
    if faults := list(_faults(state_dict, wanted, arrays, head)):
        raise ValueError(f"the state dict does not fit the net: {'; '.join(faults)}")
    variables = {
        tensor.path: np.ascontiguousarray(_from_torch(arrays[name], tensor)) for name, tensor in wanted.items()
    }
    if reset_head:
        variables |= _new_head(model, channels, seed)
    return unflatten_dict(variables)


def rename_tensors(state_dict: Mapping[str, Any], renames: Sequence[str]) -> dict[str, Any]:
    """Renames parts of the tensors' names, the parts being what stands between dots.

    Args:
        state_dict: PyTorch's names to arrays.
        renames: each `OLD:NEW`, in order: `linear:fc` makes `fc.weight` of `linear.weight`. OLD may be several parts
            with dots between them; an empty NEW drops them, as `backbone:` for `backbone.conv1.weight`.

    Raises:
        ValueError: no `OLD:NEW`, an OLD that is in no name, or two tensors that get the same name.
    """
    for rename in renames:
        old, colon, new = rename.partition(":")
        if not old or not colon:
            raise ValueError(f"--rename={rename}: give OLD:NEW, as linear:fc")
        names = {name: _replace_parts(name, old, new) for name in state_dict}
        if all(name == renamed for name, renamed in names.items()):
            raise ValueError(f"--rename={rename}: no tensor has {old!r} in its name; there are {some(list(names))}")
        if len(set(names.values())) < len(names):
            raise ValueError(f"--rename={rename}: gives two tensors the same name")
        state_dict = {names[name]: array for name, array in state_dict.items()}
    return dict(state_dict)


def _replace_parts(name, old, new):
    return f".{name}.".replace(f".{old}.", f".{new}." if new else ".").strip(".")


def some(names: Sequence[str], count: int = 6) -> str:
    """List the first of some names, for a message."""
    listed = ", ".join(itertools.islice(names, count))
    return f"{listed}, ..." if len(names) > count else listed


def torch_tensors(model: SDPointNet, channels: int = 3, dialect: str = "torchvision") -> dict[str, _Tensor]:
    """Lists every variable of `model` by PyTorch's name, with its shape there and its path in our variables."""
    names, tensors = model.torch_names(dialect), {}
    for path, leaf in flatten_dict(_shapes(model, channels)).items():
        _, *layer, last = path
        found = names.get("/".join(path[1:]), "")
        if isinstance(found, TorchTensor):
            tensors[found.name] = _Tensor(found.shape, path, leaf.shape)
            continue
        shape = tuple(leaf.shape[axis] for axis in np.argsort(_AXES[leaf.ndim]))
        tensors[found or f"{names['/'.join(layer)]}.{_LEAVES[last]}"] = _Tensor(shape, path)
    return tensors


def _from_torch(array, tensor):
    if tensor.ours is None:
        return array.transpose(_AXES[array.ndim])
    # A linear layer may be a convolution there, over the whole map.
    return array.reshape(len(array), -1).T if len(tensor.ours) == 2 else array.reshape(tensor.ours)


def _shapes(model, channels):
    side = max(model.min_image_size, 32)
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def unwrap(state_dict: Mapping[str, Any], wanted: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Drop what wraps a net in a state dict: a prefix of the names, and tensors of losses, metrics and averages.

    Args:
        state_dict: names to arrays, such as `module.conv1.weight` or `model.conv1.weight`.
        wanted: names of the net's tensors. The prefix is the one with which the most of them are there.

    Returns:
        (the rest, the names that were dropped).
    """
    wanted = set(wanted)
    counts = Counter(
        name.removesuffix(rest) for name in state_dict for rest in _endings(name) if rest in wanted
    )  # Of equal ones the first, as a net stands before its average.
    prefix = max(counts, key=lambda prefix: counts[prefix], default="")
    rest = {
        name.removeprefix(prefix): array
        for name, array in state_dict.items()
        if name.startswith(prefix) and (prefix or not _is_aside(name, wanted))
    }
    return rest, [name for name in state_dict if name.removeprefix(prefix) not in rest or not name.startswith(prefix)]


def _is_aside(name, wanted):
    first = name.partition(".")[0]
    return bool(_ASIDE.fullmatch(first)) and not any(other.startswith(f"{first}.") for other in wanted)


def _endings(name):
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _float32(array) -> np.ndarray | None:
    """Returns `array` as float32; None if it holds no floats."""
    if hasattr(array, "detach"):  # PyTorch's; NumPy has no bfloat16 to receive it in.
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    with np.errstate(over="ignore"):  # An overflow is found as infinite.
        return array.astype(np.float32)


def _faults(state_dict, wanted, arrays, head) -> Iterator[str]:
    found = {name for name in state_dict if not name.endswith(".num_batches_tracked")}
    if missing := sorted(wanted.keys() - found):
        yield f"missing {', '.join(missing)}"
    if surplus := sorted(found - wanted.keys()):
        yield f"surplus {', '.join(surplus)}"
    if untyped := [name for name, array in arrays.items() if array is None]:
        yield f"not of a float type {', '.join(untyped)}"
    shapes = {name: tuple(np.shape(state_dict[name])) for name in sorted(wanted.keys() & found)}
    if misshapen := [name for name, shape in shapes.items() if shape != wanted[name].shape]:
        yield "wrong shape " + ", ".join(f"{name} {shapes[name]}, not {wanted[name].shape}" for name in misshapen)
    if any(name in head for name in misshapen):
        yield "another number of classes is imported only with reset_head (--reset-head), which draws a new classifier"
    if infinite := [name for name, array in arrays.items() if array is not None and not np.isfinite(array).all()]:
        yield f"not finite {', '.join(infinite)}"


def _new_head(model, channels, seed):
    """Draw a classifier as the net does; return its paths and arrays."""
    variables = _shapes(model, channels)
    side = max(model.min_image_size, 32)
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    last = functools.partial(model.apply, point=model.num_blocks, train=False, method="prefix")
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(last, variables, images))
    part, *path = model.classifier.split("/")
    head = model.bind({}).head.clone(parent=None, name=None)
    drawn = jax.jit(functools.partial(head.init, train=False))(jax.random.key(seed), state)["params"]
    layer = jax.device_get(functools.reduce(lambda tree, name: tree[name], path, drawn))
    return {("params", part, *path, leaf): np.asarray(array) for leaf, array in layer.items()}


def read_state_dict(path: str | Path, key: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Read the tensors of a net from a file.

    Args:
        path: `.safetensors`, or pickled by PyTorch: `.pth.tar`, `.pth`, `.pt`, `.th`, `.bin`, `.ckpt`. A pickled file
            is read as plain data; see `torch_file`.
        key: which of the file's state dicts to take, with a dot between keys inside each other. By default the one of
            the usual name, such as `state_dict` or `model`, or the only one.

    Returns:
        (tensors by name, what else the file holds, in words).

    Raises:
        ValueError: another ending, a damaged file, no state dict, or several and no `key`.
        OSError: the file cannot be opened.
        ImportError: the library that reads this ending is not installed.
    """
    path = Path(path)
    with path.open("rb"):
        pass  # The readers' own errors about missing files vary.
    if path.name.endswith(_SAFE):
        content = _read_safetensors(path)
    elif path.name.endswith(_PICKLED):
        content = torch_file.load(path)
    else:
        raise ValueError(f"{path}: unknown ending; valid are {', '.join((*_PICKLED, _SAFE))}")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no state dict, but {_kind(content)}")
    found = dict(_state_dicts(content))
    if key is None:
        key = _likeliest(list(found))
    if key not in found:
        if found:
            what = "holds several state dicts" if key is None else f"has no state dict {key!r}"
            raise ValueError(f"{path}: {what}; --key may be {', '.join(found)}")
        there = [f"{name} ({_kind(value)})" for name, value in content.items()]
        raise ValueError(f"{path}: holds no state dict, but {some(there, 12) or 'nothing'}")
    tensors = {name: array for name, array in found[key].items() if _is_tensor(array)}
    return tensors, list(_list_others(content, found[key], key))


def _likeliest(keys):
    """Return the key of the net's state dict; None if that is not clear."""
    for wanted in ("", *_KEYS):
        matches = [key for key in keys if key.split(".")[-1] == wanted]
        if matches:
            least = min(key.count(".") for key in matches)
            outermost = [key for key in matches if key.count(".") == least]
            return outermost[0] if len(outermost) == 1 else None
    return keys[0] if len(keys) == 1 else None


def _state_dicts(content, key="", depth=0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the state dicts in the content of a file, by their keys: what has tensors under names with dots."""
    if isinstance(content, torch_file.Unknown) and (tensors := torch_file.state_dict_of(content)):
        yield key, tensors  # A whole module was pickled.
    elif any(isinstance(name, str) and "." in name and _is_tensor(value) for name, value in content.items()):
        yield key, {str(name): value for name, value in content.items()}
    elif depth < _DEPTH:
        for name, value in content.items():
            if isinstance(name, str) and isinstance(value, Mapping):
                yield from _state_dicts(value, f"{key}.{name}" if key else name, depth + 1)


def _is_tensor(value):
    return isinstance(value, np.ndarray | torch_file.Tensor)


def _list_others(content, taken, key) -> Iterator[str]:
    """Yield, in words, what a file holds beside the state dict `taken` at `key`."""
    first = key.partition(".")[0]
    yield from (f"{name} ({_kind(value)})" for name, value in content.items() if name != first and key)
    yield from (f"{name} ({_kind(value)})" for name, value in taken.items() if not _is_tensor(value))


def _kind(value):
    if isinstance(value, torch_file.Unknown):
        return value.origin
    return "tensor" if _is_tensor(value) else type(value).__name__


def _read_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"{path}: reading it needs safetensors, pip install safetensors") from None
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: no sound safetensors file: {error}") from error


def import_file(
    path: str | Path,
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    reset_head: bool = False,
    renames: Sequence[str] = (),
    key: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Import a PyTorch file, ready to be saved as a checkpoint.

    Args:
        path: see `read_state_dict`.
        name: of the net, for `create_model`.
        num_classes: as many as in the file by default.
        channels: of the images.
        reset_head: see `import_torch_state_dict`.
        renames: see `rename_tensors`.
        key: see `read_state_dict`.

    Returns:
        (variables, record): see `import_torch_state_dict`; and the net and the file they belong to, for JSON. As
        `passed_over`, the record lists what else the file holds.

    Raises:
        ValueError, OSError, ImportError: see the functions that do it.
    """
    found, others = read_state_dict(path, key)
    model = create_model(name, num_classes or 1)
    known = (torch_tensors(model, channels, dialect) for dialect in DIALECTS)
    state_dict, dropped = unwrap(rename_tensors(found, renames), itertools.chain(*known))
    if num_classes is None:
        num_classes = _count_classes(state_dict, path, model)
        model = create_model(name, num_classes)
    variables = import_torch_state_dict(state_dict, model, channels=channels, reset_head=reset_head)
    source = {"imported_from": Path(path).name, "reset_head": reset_head, "passed_over": [*others, *dropped]}
    record = {"model": {"name": name}, "num_classes": num_classes, "channels": channels, **source}
    return variables, record


def _count_classes(state_dict, path, model):
    names = [model.torch_names(dialect)[model.classifier] for dialect in DIALECTS]
    biases = (state_dict.get(f"{name}.bias") for name in names)
    bias = next((bias for bias in biases if np.ndim(bias) == 1), None)
    if bias is not None:
        return len(bias)
    # The last layer with a matrix is a classifier, whatever its name.
    matrices = [name.removesuffix(".weight") for name, array in state_dict.items() if len(np.shape(array)) == 2]
    hint = f"--rename={matrices[-1]}:{names[0]} if that is the classifier" if matrices else f"--rename=OLD:{names[0]}"
    raise ValueError(f"{path}: has no vector {names[0]}.bias to tell the number of classes; {hint}, or --num-classes")
