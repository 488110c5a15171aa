"""Artefacts of small nets with drawn variables: one of every family, with all kinds of blocks and shortcuts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from interop.families import KINDS, Family

from sdpoint_jax.models import registry, resnet
from sdpoint_jax.models.architecture import Architecture
from sdpoint_jax.models.functional import normalize
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.serving.predictor import Predictor
from sdpoint_jax.storage.artefact import Artefact, SweepSettings

SMALL_STEM = dict(stem=4, imagenet_stem=False)
# The row of the table, and the size of the images: such that pools have windows that are alike and some that are not.
NETS = {
    "tiny_resnet": (Architecture((2, 1), 4, 4, stem=4), (48, 32)),
    "tiny_resnet_small": (Architecture((2, 1), 4, 4, **SMALL_STEM, shortcut="padded_identity"), (22, 14)),
    "tiny_resnet_projection": (Architecture((2, 1), 4, 4, **SMALL_STEM, shortcut="projection"), (13, 8)),
    "tiny_resnext": (Architecture((2, 1), 8, 16, bottleneck=True, stem=4, groups=4), (46, 30)),
    "tiny_preresnet": (Architecture((2, 1), 4, 16, bottleneck=True, preactivation=True, stem=4), (48, 32)),
    "tiny_wrn": (Architecture((2, 1), 8, 8, preactivation=True, **SMALL_STEM), (22, 14)),
}


def register(monkeypatch):
    """Puts the nets into the table for the time of a test."""
    for name, (net, _) in NETS.items():
        monkeypatch.setitem(resnet.ARCHITECTURES, name, net)


def artefact_of(name, *, channels=3, **fields):
    """The artefact of a net whose instances were all swept, each with statistics of its own."""
    if name in KINDS:
        model, shape = Family(num_classes=5, kind=name), (24, 36, channels)
        fields = dict(model=registry.name_of(Family), model_args=f"kind={name!r}", given_model=model) | fields
    else:
        model, shape = create_model(name, 5), (*NETS[name][1], channels)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
    rng = np.random.default_rng(0)
    statistics = {instance: _drawn(rng, variables.get("batch_stats", {})) for instance in model.instances()}
    rows = tuple(tiny.row(instance.name, 100, 0.5) for instance in statistics)
    settings = dict(
        params=_drawn(rng, variables["params"]),
        batch_stats=statistics,
        rows=rows,
        model=name,
        dtype="float32",
        class_names=tuple("abcde"),
        image_shape=shape,
        resize=shape[:2],
        mean=(0.4, 0.5, 0.6)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        config={},
        settings=SweepSettings(name, "none", "test", 1, "augmented"),
    )
    return Artefact(**settings | fields)


def images_of(swept, count):
    """Random uint8 images [count, H, W, C]."""
    return np.random.default_rng(count).integers(0, 256, (count, *swept.image_shape), np.uint8)


def logits_of(swept, images, instance):
    """The logits [B, K] of the net itself."""
    model = registry.model_of(swept)
    variables = {"params": swept.params, "batch_stats": swept.batch_stats[instance]}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # Quick to compile.
    def apply(variables, images):
        return model.apply(variables, normalize(images, swept.mean, swept.std), instance=instance, train=False)

    return apply(variables, images)


def predicted(swept, images, instance):
    """The predictor's logits [B, K], by a program that is compiled anew, not loaded from an earlier process."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return Predictor(swept).predict(images, instance=instance)
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def read_npz(path):
    """The arrays of a file, by name."""
    with np.load(path) as arrays:
        return dict(arrays)


def deviation(actual, expected):
    """The largest difference, relative to the largest number expected."""
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def _drawn(rng, shapes):
    """Variables with which activations keep their size and have both signs."""

    def draw(path, shape):
        normal = rng.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            return normal * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        return 0.5 + np.abs(normal) / 2 if path[-1] in ("scale", "var") else normal / 4

    return unflatten_dict({path: draw(path, leaf.shape) for path, leaf in flatten_dict(shapes).items()})
