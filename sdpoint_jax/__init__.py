"""Stochastic Downsampling Point (Kuen et al. 2018): train one convolutional network once, run it at dozens of costs.

What a notebook needs is here, and is imported when it is first used: `import sdpoint_jax` itself loads no JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdpoint_jax.choice.selection import Budget as Budget
    from sdpoint_jax.choice.selection import select as select
    from sdpoint_jax.instance import FULL_RESOLUTION as FULL_RESOLUTION
    from sdpoint_jax.instance import STEM as STEM
    from sdpoint_jax.instance import SDPointInstance as SDPointInstance
    from sdpoint_jax.models.net import SDPointNet as SDPointNet
    from sdpoint_jax.models.registry import create_model as create_model
    from sdpoint_jax.profiling.macs import count_cost as count_cost
    from sdpoint_jax.serving.predictor import Predictor as Predictor
    from sdpoint_jax.storage.checkpoint import load_newest as load_checkpoint  # noqa: F401

__version__ = "0.1.0"
_HOMES = {
    "FULL_RESOLUTION": ("instance", "FULL_RESOLUTION"),
    "STEM": ("instance", "STEM"),
    "SDPointInstance": ("instance", "SDPointInstance"),
    "SDPointNet": ("models.net", "SDPointNet"),
    "create_model": ("models.registry", "create_model"),
    "count_cost": ("profiling.macs", "count_cost"),
    "Predictor": ("serving.predictor", "Predictor"),
    "Budget": ("choice.selection", "Budget"),
    "select": ("choice.selection", "select"),
    "load_checkpoint": ("storage.checkpoint", "load_newest"),
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
