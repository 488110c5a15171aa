"""The trace of an inference says which BatchNorms follow a convolution, and what they make of it."""

import numpy as np
from interop import nets

from sdpoint_jax.instance import FULL_RESOLUTION
from sdpoint_jax.interop.inference_trace import norms_after_convolutions, trace_inference


def folded(name):
    swept = nets.artefact_of(name)
    return swept, norms_after_convolutions(trace_inference(swept, FULL_RESOLUTION))


def test_a_norm_of_any_name_and_epsilon_folds_into_a_convolution_with_a_bias():
    swept, norms = folded("vgg")
    assert {layer: one.norm for layer, one in norms.items()} == {
        "stem/Conv_0": "stem/renamed",
        "blocks_0/Conv_0": "blocks_0/BatchNorm_0",
    }
    params, statistics = swept.params["stem"], swept.batch_stats[FULL_RESOLUTION]["stem"]["renamed"]
    scale = params["renamed"]["scale"] / np.sqrt(statistics["var"] + 1e-3)
    shift = (params["Conv_0"]["bias"] - statistics["mean"]) * scale + params["renamed"]["bias"]
    np.testing.assert_allclose(norms["stem/Conv_0"].scale, scale, rtol=1e-6)
    np.testing.assert_allclose(norms["stem/Conv_0"].shift, shift, rtol=1e-5, atol=1e-6)


def test_depthwise_convolutions_fold_and_those_of_squeeze_excitation_have_nothing_to_fold():
    _, norms = folded("mobilenet")
    convolutions = {
        f"blocks_{k}/Conv_{i}": f"blocks_{k}/BatchNorm_{j}" for k in (0, 1) for i, j in ((0, 0), (1, 1), (4, 2))
    }
    assert {layer: one.norm for layer, one in norms.items()} == {"stem/Conv_0": "stem/BatchNorm_0", **convolutions}


def test_a_norm_before_its_convolution_and_one_of_a_sum_stay(monkeypatch):
    nets.register(monkeypatch)
    _, norms = folded("tiny_preresnet")
    assert norms["block_01/conv1"].norm == "block_01/norm2"
    assert not {"block_01/norm1", "block_02/norm1", "head/norm"} & {one.norm for one in norms.values()}
    _, norms = folded("densenet")
    assert {one.norm for one in norms.values()} == {"blocks_0/BatchNorm_1", "blocks_1/BatchNorm_1"}
