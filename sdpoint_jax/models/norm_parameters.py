"""Scales and shifts of BatchNorm that SDPoint instances have for themselves (Yu et al. 2019, "switchable").

Beside what all instances share, `params["per_instance"]` then has, by the name of an instance, the scales and shifts of
the layers after its point. Those before it are the ones of full resolution, which has none of its own: so instances
keep the prefix that they share.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sdpoint_jax.instance import FULL_RESOLUTION, SDPointInstance
from sdpoint_jax.models.net import SDPointNet

PyTree = Any
PER_INSTANCE = "per_instance"  # Their place among the parameters.


def params_for(params: Mapping[str, Any], instance: SDPointInstance) -> dict[str, Any]:
    """Returns the parameters that the net computes an instance with: the shared ones, its own in place of some.

    Args:
        params: of all instances; no array of them is copied.
        instance: without parameters of its own it has the shared ones.
    """
    shared = {name: tree for name, tree in params.items() if name != PER_INSTANCE}
    return _replace(shared, own_params(params, instance))


def own_params(params: Mapping[str, Any], instance: SDPointInstance) -> Mapping[str, Any]:
    """Returns what an instance has for itself, in place of shared parameters; an empty dict where that is nothing."""
    return params.get(PER_INSTANCE, {}).get(instance.name, {})


def with_own_norms(
    model: SDPointNet, params: Mapping[str, Any], instances: Iterable[SDPointInstance]
) -> dict[str, Any]:
    """Returns parameters in which just these instances have scales and shifts of their own.

    Args:
        model: the net.
        params: of the net. Scales and shifts that an instance has for itself it keeps; else they are the shared arrays.
        instances: of the net.
    """
    own = {instance.name: _norms_after_point(model, params_for(params, instance), instance) for instance in instances}
    own = {name: norms for name, norms in own.items() if norms}  # Full resolution has none.
    return params_for(params, FULL_RESOLUTION) | ({PER_INSTANCE: own} if own else {})


def instances_with_own_norms(params: Mapping[str, Any]) -> tuple[SDPointInstance, ...]:
    """Lists the instances that have scales and shifts of their own.

    Raises:
        ValueError: what has some is no instance.
    """
    return tuple(map(SDPointInstance.from_name, params.get(PER_INSTANCE, {})))


def _norms_after_point(model, params, instance):
    if instance == FULL_RESOLUTION:
        return {}
    modules = model.suffix_modules(model.last_shared_point(instance))
    return _norms({module: params[module] for module in modules if module in params})


def _norms(tree):
    """Picks the parameters of BatchNorm layers, which alone have a scale."""
    if "scale" in tree:
        return dict(tree)
    found = {name: _norms(inner) for name, inner in tree.items() if isinstance(inner, Mapping)}
    return {name: norms for name, norms in found.items() if norms}


def _replace(tree, others):
    """Returns nested dicts with the leaves of `others` in place of those of `tree`."""
    replaced = {
        name: _replace(tree.get(name, {}), other) if isinstance(other, Mapping) else other
        for name, other in others.items()
    }
    return {**tree, **replaced}
