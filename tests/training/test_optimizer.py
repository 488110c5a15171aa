"""The optimisers are those of their papers and of PyTorch, and decay the weights that they are told to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpoint_jax.training.optimizer import LAMB, SGD, AdamW, optimizer_of

PARAMS = {"conv": {"kernel": np.float32([[1.0, -2.0], [0.5, 3.0]])}, "norm": {"scale": np.float32([2.0, -1.0])}}
GRADS = [jax.tree.map(lambda x, f=factor: np.float32(np.sin(f * x)), PARAMS) for factor in (1, 2, 3)]
RATE = 0.1


def run(optimizer):
    """The parameters after a step for each of `GRADS`, as the training step applies updates."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(lambda param, update: param - RATE * update, params, updates)
    return params


def adam(param, grads, weight_decay, trust):
    """As Kingma & Ba 2015 write it, with decay apart from the gradients; and You et al.'s trust ratio."""
    first = second = np.zeros_like(param)
    for number, grad in enumerate(grads, 1):
        first, second = 0.8 * first + 0.2 * grad, 0.9 * second + 0.1 * grad**2
        update = first / (1 - 0.8**number) / (np.sqrt(second / (1 - 0.9**number)) + 1e-6) + weight_decay * param
        param = param - RATE * update * (np.linalg.norm(param) / np.linalg.norm(update) if trust else 1)
    return param


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("kind", [AdamW, LAMB])
def test_adamw_and_lamb_are_their_papers(kind, decay_all):
    found = run(kind((0.8, 0.9), 1e-6, 0.05, decay_all=decay_all))
    for path, decays in ((("conv", "kernel"), True), (("norm", "scale"), decay_all)):
        grads = [grad[path[0]][path[1]] for grad in GRADS]
        expected = adam(PARAMS[path[0]][path[1]], grads, 0.05 if decays else 0.0, kind is LAMB)
        np.testing.assert_allclose(found[path[0]][path[1]], expected, rtol=1e-5)


def test_adamw_is_pytorchs():
    torch = pytest.importorskip("torch")
    tensor = torch.nn.Parameter(torch.from_numpy(PARAMS["conv"]["kernel"].copy()))
    theirs = torch.optim.AdamW([tensor], RATE, (0.8, 0.9), 1e-6, weight_decay=0.05)
    for grads in GRADS:
        tensor.grad = torch.from_numpy(grads["conv"]["kernel"])
        theirs.step()
    ours = run(AdamW((0.8, 0.9), 1e-6, 0.05))["conv"]["kernel"]
    np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=1e-5)


def test_sgd_can_leave_batchnorm_and_biases_without_decay():
    whole, kernels, none = (run(SGD(0.9, False, *settings)) for settings in ((0.1,), (0.1, 0.0, False), (0.0,)))
    np.testing.assert_array_equal(kernels["conv"]["kernel"], whole["conv"]["kernel"])
    np.testing.assert_array_equal(kernels["norm"]["scale"], none["norm"]["scale"])
    assert (whole["norm"]["scale"] != none["norm"]["scale"]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SGD(0.9, False, 1e-4)),
        ({"nesterov": True, "weight_decay_on": "kernels"}, SGD(0.9, True, 1e-4, 0.0, False)),
        ({"optimizer": "adamw", "betas": (0.5, 0.6), "clip_norm": 1.0}, AdamW((0.5, 0.6), 1e-8, 1e-4, 1.0)),
        ({"optimizer": "lamb", "epsilon": 1e-6}, LAMB((0.9, 0.999), 1e-6, 1e-4)),
    ],
)
def test_the_config_names_the_optimiser(values, expected):
    found = optimizer_of(tiny.config(**values))
    assert found == expected and type(found) is type(expected)


def test_gradients_are_clipped_before_an_optimiser_sees_them():
    grads = jax.tree.map(lambda x: 1000 * jnp.asarray(x), GRADS[0])
    clipped, _ = SGD(0.0, False, 0.0, 1.0).update(grads, SGD(0.0, False, 0.0, 1.0).init(PARAMS), PARAMS)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(clipped)))
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)
