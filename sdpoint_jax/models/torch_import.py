"""PyTorch weights of the authors' release and of torchvision, as variables of our nets.

    python -m sdpoint_jax import checkpoint.pth.tar --model=preresnet101 --output=runs/preresnet101

Both name their tensors alike, and so does timm: `conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0`, `fc`, and
`bn2` for the last BatchNorm of a pre-activation net. Other names are brought to these by renaming parts of them, as
`linear` to `fc`. Pickled files need PyTorch, `.safetensors` files do not.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sdpoint_jax.models.net import SDPointNet, TorchTensor
from sdpoint_jax.models.registry import create_model

_PICKLED = (".pth.tar", ".pth", ".pt", ".th", ".bin")
_SAFE = ".safetensors"
_SAFE_TORCH = "2.6"  # Before, weights_only could be tricked into running code (CVE-2025-32434).
_DATA_PARALLEL = "module."
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
        state_dict: PyTorch's names to arrays (NumPy's, or PyTorch's tensors) of any float type; a prefix `module.`
            on all names is dropped, `num_batches_tracked` is ignored.
        model: the same net here.
        channels: of the images.
        reset_head: draw a new classifier instead of importing one, as for another number of classes.
        seed: of that draw.

    Returns:
        {"params", "batch_stats"}: nested dicts of float32 NumPy arrays.

    Raises:
        ValueError: tensors are missing, surplus, of a wrong shape or type, or not finite; names all of them.
    """
    state_dict = _without_prefix(state_dict)
    wanted = torch_tensors(model, channels, dialect_of(state_dict, model, channels))
    head = {name for name, tensor in wanted.items() if "/".join(tensor.path[1:-1]) == model.classifier}
    if reset_head:
        wanted = {name: tensor for name, tensor in wanted.items() if name not in head}
        state_dict = {name: array for name, array in state_dict.items() if name not in head}
    arrays = {name: _float32(state_dict[name]) for name in sorted(wanted) if name in state_dict}
    if faults := list(_faults(state_dict, wanted, arrays, head)):
        raise ValueError(f"the state dict does not fit the net: {'; '.join(faults)}")
    floats = {name: array for name, array in arrays.items() if array is not None}
    variables = {
        tensor.path: np.ascontiguousarray(_from_torch(floats[name], tensor)) for name, tensor in wanted.items()
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
            raise ValueError(f"--rename={rename}: no tensor has {old!r} in its name; there are {_some(names)}")
        if len(set(names.values())) < len(names):
            raise ValueError(f"--rename={rename}: gives two tensors the same name")
        state_dict = {names[name]: array for name, array in state_dict.items()}
    return dict(state_dict)


def _replace_parts(name, old, new):
    return f".{name}.".replace(f".{old}.", f".{new}." if new else ".").strip(".")


def _some(names, count=6):
    listed = ", ".join(itertools.islice(names, count))
    return f"{listed}, ..." if len(names) > count else listed


def torch_tensors(model: SDPointNet, channels: int = 3, dialect: str = "torchvision") -> dict[str, _Tensor]:
    """Lists every variable of `model` by PyTorch's name, with its shape there and its path in our variables."""
    names, tensors = model.torch_names(dialect), {}
    for path, leaf in flatten_dict(_shapes(model, channels)).items():
        _, *layer, last = path
        found = names.get("/".join(path[1:])) or names["/".join(layer)]
        if isinstance(found, TorchTensor):
            tensors[found.name] = _Tensor(found.shape, path, leaf.shape)
            continue
        shape = tuple(leaf.shape[axis] for axis in np.argsort(_AXES[leaf.ndim]))
        tensors[f"{found}.{_LEAVES[last]}"] = _Tensor(shape, path)
    return tensors


def dialect_of(state_dict: Mapping[str, Any], model: SDPointNet, channels: int = 3) -> str:
    """Return whose names most tensors of a state dict have, `torchvision` or `timm`."""
    known = {dialect: len(state_dict.keys() & torch_tensors(model, channels, dialect)) for dialect in DIALECTS}
    return max(known, key=lambda dialect: known[dialect])


def _from_torch(array, tensor):
    return array.transpose(_AXES[array.ndim]) if tensor.ours is None else array.reshape(tensor.ours)


def _shapes(model, channels):
    side = max(model.min_image_size, 32)
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def _without_prefix(state_dict):
    if not all(name.startswith(_DATA_PARALLEL) for name in state_dict):
        return dict(state_dict)
    return {name.removeprefix(_DATA_PARALLEL): array for name, array in state_dict.items()}


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
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if misshapen := [name for name, array in arrays.items() if array.shape != wanted[name].shape]:
        yield "wrong shape " + ", ".join(f"{name} {arrays[name].shape}, not {wanted[name].shape}" for name in misshapen)
    if any(name in head for name in misshapen):
        yield "another number of classes is imported only with reset_head (--reset-head), which draws a new classifier"
    if infinite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
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


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Reads the tensors in a file, by name; below the key `state_dict` if the file has it.

    Args:
        path: `.safetensors`, or pickled by PyTorch: `.pth.tar`, `.pth`, `.pt`, `.th`, `.bin`. A pickled file is read as
            plain data: one that would run code is refused.

    Raises:
        ValueError: another ending, a damaged file, one that holds more than plain data or no tensors by name.
        OSError: the file cannot be opened.
        ImportError: the library that reads this ending is not installed, or an unsafe version of it.
    """
    path = Path(path)
    with path.open("rb"):
        pass  # The readers' own errors about missing files vary.
    if path.name.endswith(_SAFE):
        content = _read_safetensors(path)
    elif path.name.endswith(_PICKLED):
        content = _read_pickled(path)
    else:
        raise ValueError(f"{path}: unknown ending; valid are {', '.join((*_PICKLED, _SAFE))}")
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: holds no state dict, neither by itself nor below the key 'state_dict'")
    return dict(content)


def _read_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"{path}: reading it needs safetensors, pip install safetensors") from None
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: no sound safetensors file: {error}") from error


def _read_pickled(path):
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path}: reading it needs PyTorch, pip install torch (or convert to .safetensors)") from None
    if torch.__version__ < _SAFE_TORCH:
        raise ImportError(f"PyTorch {torch.__version__}: files are read safely only from {_SAFE_TORCH} on")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damage shows in many types: pickle's, zipfile's, EOFError, RuntimeError.
        raise ValueError(f"{path}: damaged, or holds more than plain data; not loaded") from error


def import_file(
    path: str | Path,
    name: str,
    *,
    num_classes: int | None = None,
    channels: int = 3,
    reset_head: bool = False,
    renames: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Imports a PyTorch file, ready to be saved as a checkpoint.

    Args:
        path: see `read_state_dict`.
        name: of the net, for `create_model`.
        num_classes: as many as in the file by default.
        channels: of the images.
        reset_head: see `import_torch_state_dict`.
        renames: see `rename_tensors`.

    Returns:
        (variables, record): see `import_torch_state_dict`; and the net and the file they belong to, for JSON.

    Raises:
        ValueError, OSError, ImportError: see the functions that do it.
    """
    state_dict = rename_tensors(_without_prefix(read_state_dict(path)), renames)
    num_classes = _count_classes(state_dict, path, create_model(name, 1)) if num_classes is None else num_classes
    model = create_model(name, num_classes)
    variables = import_torch_state_dict(state_dict, model, channels=channels, reset_head=reset_head)
    source = {"imported_from": Path(path).name, "reset_head": reset_head}
    record = {"model": {"name": name}, "num_classes": num_classes, "channels": channels, **source}
    return variables, record


def _count_classes(state_dict, path, model):
    names = [model.torch_names(dialect)[model.classifier] for dialect in DIALECTS]
    biases = (state_dict.get(f"{name}.bias") for name in names)
    bias = next((bias for bias in biases if np.ndim(bias) == 1), None)
    if bias is None:
        raise ValueError(
            f"{path}: has no vector {names[0]}.bias to tell the number of classes; --rename=OLD:{names[0]} if the "
            "classifier has another name, or --num-classes"
        )
    return len(bias)
