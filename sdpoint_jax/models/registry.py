"""The nets by name: `create_model("preresnet101", num_classes=1000)`, or `create_model("mynets:VGG", num_classes=10)`.

A family is a module of this package with `NAMES`, the names of its nets; `PATTERNS`, names with numbers to fill in; and
`create(name, **attributes)`, which returns None for a name that is not its own.
"""

import ast
import dataclasses
import difflib
import importlib
import os
import sys
from typing import Any, Protocol

import jax.numpy as jnp
from flax import linen as nn

from sdpoint_jax.models import convnext, densenet, efficientnet, mobilenet, regnet, resnet, vgg, vit
from sdpoint_jax.models.net import SDPointNet

FAMILIES = (resnet, densenet, vgg, mobilenet, efficientnet, regnet, convnext, vit)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class NamesModel(Protocol):
    """What names a net: an artefact."""

    @property
    def model(self) -> str:
        """Name of the net; see `create_model`."""

    @property
    def model_args(self) -> str:
        """Attributes of the net; see `create_model`."""

    @property
    def downsampling(self) -> str:
        """Operation at the points."""

    @property
    def dtype(self) -> str:
        """Type of the computation."""

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""

    @property
    def given_model(self) -> Any:
        """The net's class, the net itself or its name, if the user gave it."""


def model_names() -> tuple[str, ...]:
    """Return the names of all nets of all families."""
    return tuple(name for family in FAMILIES for name in family.NAMES)


def create_model(
    name: str, num_classes: int, *, dtype: Any = jnp.float32, args: str = "", **attributes: Any
) -> SDPointNet:
    """Return the net called `name`.

    Args:
        name: One of `model_names()` or of the patterns of a family; what follows a dot is timm's name of the weights,
            as in `resnet50.a1_in1k`, and has no effect. Or `module:Class`, a subclass of `SDPointNet`: the module is
            imported, so its code runs.
        num_classes: Number of classes, K, at least 1.
        dtype: Type of the computation, float32 or bfloat16 (also as a string); parameters and statistics are float32.
        args: Attributes of the net as Python writes keyword arguments, as in `widths=(8, 16), depth=2`.
        **attributes: Further attributes.

    Raises:
        ValueError: An unknown name, attribute or dtype, or no positive number of classes.
    """
    if ":" in name:
        return make_model(import_class(name), num_classes, dtype=dtype, **parse_args(args), **attributes)
    dtype = _check(num_classes, dtype)
    given = parse_args(args) | attributes
    known = name.partition(".")[0]
    for family in FAMILIES:
        model = family.create(known, num_classes=num_classes, dtype=dtype)
        if model is not None:
            _check_attributes(type(model), given)
            return model.clone(**given)
    raise ValueError(f"model {name!r}: {_nearest(known, model_names())}; or module:Class, a net of your own")


def make_model(
    made_from: type[SDPointNet] | SDPointNet, num_classes: int, *, dtype: Any = jnp.float32, **attributes: Any
) -> SDPointNet:
    """Return a user's net from its class, or from a net of the class, whose own attributes then are the defaults.

    Raises:
        ValueError: It is not an `SDPointNet`, lacks an attribute, or is a net of another number of classes.
    """
    dtype = _check(num_classes, dtype)
    cls = made_from if isinstance(made_from, type) else type(made_from)
    if not issubclass(cls, SDPointNet):
        raise ValueError(f"model {made_from!r}: needs a subclass of sdpoint_jax.SDPointNet")
    # A class that computes in float32 alone needs no dtype; one that is asked for something else does.
    if dtype != jnp.float32 or _has_field(cls, "dtype"):
        attributes = {"dtype": dtype, **attributes}
    _check_attributes(cls, attributes)
    if isinstance(made_from, SDPointNet):
        if made_from.num_classes != num_classes:
            raise ValueError(f"model {cls.__name__}: has {made_from.num_classes} classes, needs {num_classes}")
        if dtype == jnp.float32:
            attributes.pop("dtype", None)
        return made_from.clone(**attributes)
    try:
        return cls(num_classes=num_classes, **attributes)
    except TypeError as error:  # An attribute without a default.
        raise ValueError(f"model {name_of(cls)}: {error}; set config.model.args") from None


def model_of(named: NamesModel) -> SDPointNet:
    """Return the net of an artefact.

    Raises:
        ValueError: It is a user's net, `module:Class`, and the user has not given it: to import it would run its code.
    """
    check_allowed(named.model, named.given_model, "the artefact")
    attributes = {"downsampling": named.downsampling}
    if named.given_model is None or isinstance(named.given_model, str):
        return create_model(named.model, named.num_classes, dtype=named.dtype, args=named.model_args, **attributes)
    attributes |= {} if isinstance(named.given_model, SDPointNet) else parse_args(named.model_args)
    return make_model(named.given_model, named.num_classes, dtype=named.dtype, **attributes)


def check_allowed(name: str, given: Any, where: str) -> None:
    """Raise ValueError if a file names a net whose module would be imported, and the user has not given that net."""
    if ":" in name and given is None:
        raise ValueError(
            f"{where} names the net {name}, whose code would run: allow it with --model={name}, or model= in Python"
        )
    if isinstance(given, str) and given != name:
        raise ValueError(f"--model={given}: {where} names the net {name}")


def name_of(found: Any) -> str:
    """Return the name by which `create_model` imports a class, and `import_named` a function."""
    named = found if hasattr(found, "__qualname__") else type(found)  # As an object that can be called.
    return f"{named.__module__}:{named.__qualname__}"


def import_class(name: str) -> type[SDPointNet]:
    """Import the class called `module:Class`, also from the working directory.

    Raises:
        ValueError: There is no such module or class, or it is not an `SDPointNet`.
    """
    module_name, _, class_name = name.partition(":")
    module = _import_module(module_name, f"model {name!r}", "module:Class, as mynets:VGG")
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, SDPointNet):
        nets = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, SDPointNet)]
        own = [key for key in nets if getattr(module, key).__module__ == module.__name__]
        raise ValueError(
            f"model {name!r}: {module_name} has no subclass of sdpoint_jax.SDPointNet of this name; "
            f"it has {', '.join(own) or 'none at all'}"
        )
    return found


def import_named(name: str, key: str) -> Any:
    """Import what is called `module:function`, also from the working directory; `key` is for the message.

    Raises:
        ValueError: There is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    module = _import_module(module_name, f"{key} {name!r}", "module:function, as mymodule:my_function")
    if not hasattr(module, function_name):
        names = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        raise ValueError(f"{key} {name!r}: {module_name} has no {function_name!r}: {_nearest(function_name, names)}")
    return getattr(module, function_name)


def _import_module(name, what, form):
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # Last, so that a file there hides no installed package.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        where = "the module must be installed or in the working directory"
        raise ValueError(f"{what}: {error}; {where}") from error
    except (ValueError, TypeError):
        raise ValueError(f"{what}: give {form}") from None


def parse_args(args: str) -> dict[str, Any]:
    """Return the keyword arguments that a text such as `widths=(8, 16), depth=2` gives; literals alone.

    Raises:
        ValueError: The text is something else.
    """
    try:
        call = ast.parse(f"net({args})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"model.args {args!r}: give keyword arguments, as widths=(8, 16), depth=2") from None


def _check(num_classes, dtype):
    if num_classes < 1:
        raise ValueError(f"num_classes {num_classes}: at least 1")
    if str(dtype) not in _DTYPES and dtype not in _DTYPES.values():
        raise ValueError(f"dtype {dtype!r}: valid are {', '.join(_DTYPES)}")
    return _DTYPES.get(str(dtype), dtype)


def _fields(cls):
    names = (field.name for field in dataclasses.fields(cls) if field.init)
    return [name for name in names if name not in ("parent", "name", "num_classes")]


def _has_field(cls, name):
    return name in _fields(cls)


def _check_attributes(cls: type[nn.Module], attributes):
    for name in attributes:
        if not _has_field(cls, name):
            raise ValueError(f"model {cls.__name__}: has no attribute {name!r}: {_nearest(name, _fields(cls))}")


def _nearest(name, names, count=6):
    nearest = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    listed = [*nearest, *(other for other in names if other not in nearest)]
    more = f", ... ({len(listed)} in all)" if len(listed) > 2 * count else ""
    return f"valid are {', '.join(listed[: 2 * count])}{more}"
