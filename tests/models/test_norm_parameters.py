"""An instance has scales and shifts for itself after its point alone, and shares everything else."""

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.norm_parameters import instances_with_own_norms, params_for, with_own_norms
from sdpoint_jax.models.resnet import ResNet

FIRST, LAST = SDPointInstance(1, 0.5), SDPointInstance(3, 0.5)


def params_of(model, size=8):
    images = np.zeros((1, size, size, 1), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)["params"])
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def layers_of(own):
    return {"/".join(path[:-1]) for path in flatten_dict(own)}


def test_an_instance_has_those_of_the_layers_after_its_point():
    model = tiny.net()
    params = with_own_norms(model, params_of(model), model.instances())
    own = params["per_instance"]
    of_blocks = {f"block_{k:02d}/norm{index}" for k in (2, 3) for index in (1, 2)}
    assert layers_of(own["p01_r0.50"]) == layers_of(own["p01_r0.75"]) == of_blocks | {"head/norm"}
    assert layers_of(own["p03_r0.50"]) == {"head/norm"} and "full" not in own
    assert {path[-1] for path in flatten_dict(own)} == {"scale", "bias"}
    assert set(instances_with_own_norms(params)) == set(model.instances()) - {FULL_RESOLUTION}


def test_after_the_stem_an_instance_has_those_of_all_blocks_shortcuts_included():
    model = ResNet(architecture=Architecture((1, 1), 4, 4, stem=4), num_classes=10)
    own = with_own_norms(model, params_of(model, 32), model.instances())["per_instance"]
    assert layers_of(own["stem_r0.50"]) == layers_of(own["p01_r0.50"]) | {"block_01/norm1", "block_01/norm2"}
    assert "block_02/shortcut_norm" in layers_of(own["p01_r0.50"])
    assert not any("p02" in name for name in own)  # What follows the last point has no BatchNorm.
    assert SDPointInstance(STEM, 0.75).name in own


def test_the_parameters_for_an_instance_are_its_own_and_otherwise_the_shared_arrays():
    model = tiny.net()
    shared = params_of(model)
    params = with_own_norms(model, shared, [FIRST])
    params["per_instance"] = jax.tree.map(lambda x: x + 1, params["per_instance"])
    found = flatten_dict(params_for(params, FIRST), sep="/")
    own = flatten_dict(params["per_instance"]["p01_r0.50"], sep="/")
    for name, array in flatten_dict(shared, sep="/").items():
        assert found[name] is own.get(name, array)
    assert found.keys() == flatten_dict(shared, sep="/").keys() and len(own) == 10
    for other in (FULL_RESOLUTION, LAST):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params_for(params, other), shared))


def test_what_an_instance_has_it_keeps_and_others_begin_with_the_shared():
    model = tiny.net()
    params = with_own_norms(model, params_of(model), [FIRST])
    params["per_instance"] = jax.tree.map(lambda x: x + 1, params["per_instance"])
    kept = with_own_norms(model, params, [FIRST, LAST])
    assert kept["per_instance"]["p01_r0.50"] == params["per_instance"]["p01_r0.50"]
    assert kept["per_instance"]["p03_r0.50"]["head"]["norm"]["scale"] is params["head"]["norm"]["scale"]
    assert set(with_own_norms(model, params, [])) == set(params) - {"per_instance"}


def test_what_is_no_instance_has_none():
    with pytest.raises(ValueError, match="'stem2'"):
        instances_with_own_norms({"per_instance": {"stem2": {}}})
