"""The contract of a network with downsampling points: a stem, blocks 1..N, a head, and one place where a point acts.

A network that keeps it is trained, swept, profiled, exported and served like the ones of this package:

    class VGG(SDPointNet):
        widths: tuple[int, ...] = (64, 128, 256)

        def setup(self):
            self.stem = ConvNormReLU(self.widths[0])
            self.blocks = [Stage(width) for width in self.widths]
            self.head = Classifier(self.num_classes)

The *activation at point k* is the output of block k, before the point acts on it; the activation at `STEM` is the
output of the stem. The layers before a point are its *prefix*, the layers after it its *suffix*. An instance computes
the same as full resolution up to its point, so whoever keeps the activation at a point runs suffixes alone.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from sdpoint_jax import instance as sdpoint
from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models import downsample
from sdpoint_jax.models.pool import adaptive_max_pool, max_pool
from sdpoint_jax.models.shared_trace import apply_block

PyTree = Any
DEVICE_AXIS = "devices"  # Axis over which programs map devices, and over which BatchNorm can normalise.


class TorchTensor(NamedTuple):
    """Name and shape of a PyTorch tensor that is no weight or bias of a layer."""

    name: str
    shape: tuple[int, ...]


class PartNames(NamedTuple):
    """Names under which a network's variables hold its parts, as in `params["block_01"]`."""

    stem: str
    blocks: tuple[str, ...]
    head: str


class SDPointNet(nn.Module, kw_only=True):
    """Base class of networks that can be downsampled at any of their points.

    A subclass assigns three things in `setup`, each made of Linen modules called as `(x, train)`:

    - `stem`: images [B, H, W, C] to the first state;
    - `blocks`: a list; each maps the state to the next one, and a downsampling point follows each;
    - `head`: the state after the last block, at any resolution, to logits [B, K].

    The state is a map [B, h, w, C]. A network whose state is something else, such as tokens beside a class token,
    overrides `downsample`. Random numbers for dropout come from any rng collection, and batch statistics from
    `nn.BatchNorm`, of any momentum, epsilon and name; other variable collections than `params` and `batch_stats` are
    not supported. Layers should follow `train` as usual: `nn.BatchNorm(use_running_average=not train)`,
    `nn.Dropout(rate, deterministic=not train)`; `nn.Dropout(rate, broadcast_dims=(1, 2, 3))` is stochastic depth.

    Attributes:
        num_classes: Number of classes, K.
        remat: Whether the backward pass recomputes the activations inside blocks instead of storing them.
        downsampling: Operation at the points; a key of `downsample.OPERATIONS`. The paper's is `avg`.
    """

    num_classes: int
    remat: bool = False
    downsampling: str = "avg"

    def __call__(self, images: jax.Array, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool) -> jax.Array:
        """Return the logits of images.

        Args:
            images: [B, H, W, C], normalised; H and W at least `min_image_size`.
            instance: Static: each instance is a program of its own.
            train: Static: whether BatchNorm uses the batch's own statistics, and dropout is on.

        Returns:
            logits [B, K], in float32 at least.

        Raises:
            ValueError: The network does not have the instance, or the images are too small for it.
        """
        return self.suffix(self.prefix(images, STEM, train=train), STEM, instance=instance, train=train)

    def prefix(self, images: jax.Array, point: int, *, train: bool) -> PyTree:
        """Return the activation at `point` (`STEM` or a block) of images [B, H, W, C]."""
        self.check_image_size((images.shape[1], images.shape[2]))
        x = self.stem(images, train)
        self._check_state(x, x, self.stem.name)
        return self.between(x, STEM, point, train=train)

    def between(
        self, x: PyTree, start: int, end: int, *, instance: SDPointInstance = FULL_RESOLUTION, train: bool
    ) -> PyTree:
        """Return the activation at point `end` from the activation at an earlier point `start`: the loop of blocks."""
        for k in range(max(start, 0) + 1, end + 1):
            before = self._pass_point(x, k - 1 or STEM, instance)
            x = apply_block(self.blocks[k - 1], before, remat=self.remat, train=train)
            self._check_state(x, before, self.blocks[k - 1].name)
        return x

    def suffix(self, x: PyTree, start: int, *, instance: SDPointInstance, train: bool) -> jax.Array:
        """Return the logits [B, K] of `instance` from the activation at `start`, a point up to the instance's own.

        Raises:
            ValueError: The network does not have the instance, or the instance downsamples before `start`.
        """
        self.check_instance(instance)
        if start > self.last_shared_point(instance):
            raise ValueError(f"instance {instance.name} downsamples before point {start}: no suffix of it starts there")
        x = self.between(x, start, self.num_blocks, instance=instance, train=train)
        logits = self.head(self._pass_point(x, self.num_blocks, instance), train)
        if getattr(logits, "shape", ())[1:] != (self.num_classes,):
            raise ValueError(
                f"{type(self).__name__}: the head gives {_describe(logits)}, needs logits [B, {self.num_classes}]"
            )
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def _pass_point(self, x, point, instance):
        """Return the input of the layer after `point`: the only place where a point acts."""
        if point == STEM:
            return self._stem_pool(x, instance) if self.has_stem_point else x
        if point == instance.point:
            x = self.downsample(x, instance.ratio)
        return self.after_point(x)

    def _stem_pool(self, x, instance):
        if instance.point == STEM:
            halves = tuple(-(-side // 2) for side in x.shape[1:3])
            return adaptive_max_pool(x, downsample.downsampled_sizes(halves, instance.ratio))
        return max_pool(x)

    def downsample(self, x: PyTree, ratio: float) -> PyTree:
        """Return the state shrunk by `ratio`. Override it where the state is not a map [B, h, w, C]."""
        return downsample.downsample(x, ratio, self.downsampling)

    def after_point(self, x: PyTree) -> PyTree:
        """Return what follows a point, at every instance. Override it where the point precedes a last activation."""
        return x

    @property
    def has_stem_point(self) -> bool:
        """Whether a 3x3/2 max-pool follows the stem and is the point `STEM`. A subclass may set it to True."""
        return False

    @property
    def min_image_size(self) -> int:
        """Smallest side of images that the network takes, in pixels."""
        return 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks, N."""
        return len(self.part_names.blocks)

    @property
    def part_names(self) -> PartNames:
        """Names of the variables of the stem, of each block and of the head.

        Raises:
            ValueError: `setup` does not give a stem, blocks and a head.
        """
        return _names_of_parts(self) if self.scope is not None else _names_of_unbound(self)

    def prefix_modules(self, point: int) -> tuple[str, ...]:
        """Names of the parts before `point`, in order; the last one ends at the point."""
        return (self.part_names.stem, *self.part_names.blocks[: max(point, 0)])

    def suffix_modules(self, point: int) -> tuple[str, ...]:
        """Names of the parts after `point`, in order."""
        return (*self.part_names.blocks[max(point, 0) :], self.part_names.head)

    def last_shared_point(self, instance: SDPointInstance) -> int:
        """Return the last point whose activation `instance` shares with full resolution: its own."""
        return instance.point or self.num_blocks

    def instances(
        self, ratios: Iterable[float] = sdpoint.DEFAULT_RATIOS, points: Iterable[int] | None = None
    ) -> tuple[SDPointInstance, ...]:
        """Return the network's instances in order of depth; see `instance.list_instances`."""
        return sdpoint.list_instances(self.num_blocks, has_stem_point=self.has_stem_point, ratios=ratios, points=points)

    def check_instance(self, instance: SDPointInstance) -> None:
        """Raise ValueError if the network does not have the point of `instance`."""
        if instance.point > self.num_blocks or (instance.point == STEM and not self.has_stem_point):
            points = sdpoint.describe_points(self.num_blocks, self.has_stem_point)
            raise ValueError(f"instance {instance.name}: the net has no point {instance.point}; it has {points}")

    def check_image_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError if images of `size` (height, width) are too small for the network."""
        if min(size) < self.min_image_size:
            raise ValueError(
                f"image size {size[0]}x{size[1]}: too small for the net, which needs sides of at least "
                f"{self.min_image_size}"
            )

    def torch_names(self, dialect: str) -> dict[str, str | TorchTensor]:
        """Return PyTorch's name of each layer by ours, as in {"stem/conv": "conv1"}, to import and export weights.

        Args:
            dialect: `torchvision` or `timm`, where their names differ.

        Returns:
            PyTorch's modules by the paths of our layers. A parameter whose tensor is named otherwise than its layer's
            weight or bias is listed by its own path; one that is laid out otherwise, with the tensor's shape.

        Raises:
            ValueError: The network has no names of this dialect.
        """
        raise ValueError(f"{type(self).__name__}: has no names of {dialect}; a net's method torch_names gives them")

    @property
    def classifier(self) -> str:
        """Path of the layer that `reset_head` draws again for other classes."""
        return f"{self.part_names.head}/dense"

    def _check_state(self, x, before, part):
        """Check what a part returned: a state of the same structure, none of whose axes has become empty."""
        if jax.tree.structure(x) != jax.tree.structure(before) or not all(map(_is_array, jax.tree.leaves(x))):
            raise ValueError(f"{type(self).__name__}: {part} returns {_describe(x)}, takes {_describe(before)}")
        if any(0 in leaf.shape for leaf in jax.tree.leaves(x)):
            raise ValueError(f"{type(self).__name__}: {part} returns {_describe(x)}: the images are too small for it")


def draws_random_numbers(model: SDPointNet, image_shape: tuple[int, int, int]) -> bool:
    """Return whether training draws random numbers, as dropout does; `image_shape` is (H, W, C)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    # BatchNorm over all devices needs their axis.
    on_devices = jax.vmap(train, in_axes=(None, 0), axis_name=DEVICE_AXIS)
    try:
        jax.eval_shape(
            on_devices, {"params": variables.get("params", {})}, jax.ShapeDtypeStruct((1, *images.shape), jnp.float32)
        )
    except errors.InvalidRngError:
        return True
    return False


def _is_array(x):
    return isinstance(x, jax.Array | jax.core.Tracer | jax.ShapeDtypeStruct) and x.ndim > 0


def _describe(x):
    if hasattr(x, "shape"):
        return f"{x.dtype} [{', '.join(map(str, x.shape))}]"
    return f"{type(x).__name__} of {', '.join(map(_describe, x))}" if isinstance(x, tuple | list) else type(x).__name__


def _names_of_parts(model: SDPointNet) -> PartNames:
    """Return the names of a bound network's parts, which `setup` has made."""
    name = type(model).__name__
    try:
        stem, blocks, head = model.stem, model.blocks, model.head
    except errors.NameInUseError as error:
        raise ValueError(f"{name}.setup: two parts share a name: {_first_sentence(error)}") from None
    except AttributeError as error:
        if getattr(error, "name", None) not in ("stem", "blocks", "head"):
            raise
        raise ValueError(f"{name}.setup: assigns no {error.name}; a net needs stem, blocks and head") from None
    if not isinstance(blocks, Sequence) or not blocks:
        raise ValueError(f"{name}.setup: blocks {blocks!r}; needs a list of at least one block")
    if wrong := [part for part in (stem, *blocks, head) if not isinstance(part, nn.Module)]:
        raise ValueError(f"{name}.setup: {wrong[0]!r}: the stem, each block and the head are flax.linen modules")
    names = PartNames(stem.name, tuple(block.name for block in blocks), head.name)
    every = [names.stem, *names.blocks, names.head]
    if repeated := [part for index, part in enumerate(every) if part in every[:index]]:
        raise ValueError(
            f"{name}.setup: two parts are called {repeated[0]}; each needs a name and variables of its own"
        )
    return names


def _first_sentence(error):
    return str(error).partition(". ")[0]


def _names_of_unbound(model: SDPointNet) -> PartNames:
    """Return the names of the parts of a network without variables; only an unhashable one is set up every time."""
    try:
        return _cached_names(model)
    except TypeError:
        return _names_of_parts(model.bind({}))


@functools.lru_cache(256)
def _cached_names(model):
    return _names_of_parts(model.bind({}))
