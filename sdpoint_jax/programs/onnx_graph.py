"""ONNX graphs (opset 17) of SDPoint instances, built from the table of nets.

They compute in float32 whatever the net computes in. Parameters have our names (`block_01/conv1/kernel`) and PyTorch's
axes. Statistics stay in BatchNormalization, which runtimes fold when they load a model: folded in the graph, no two
instances could share their weights.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx
from flax import traverse_util
from onnx import TensorProto, helper, numpy_helper

from sdpoint_jax.instance import FULL_RESOLUTION, STEM, SDPointInstance
from sdpoint_jax.models.architecture import Architecture, BlockSpec, ConvolutionSpec, ShortcutSpec
from sdpoint_jax.models.norm_parameters import own_params, params_for
from sdpoint_jax.models.pool import averaging_matrix, downsampled_size, window_cells
from sdpoint_jax.models.registry import create_model
from sdpoint_jax.models.resnet import NORM_EPSILON
from sdpoint_jax.programs.layout import channels_first
from sdpoint_jax.storage.artefact import Artefact

OPSET, IR_VERSION = 17, 8  # Of the year 2022: what every runtime in use reads.
Size = tuple[int, int]  # Height and width.
Value = TypeVar("Value")
_END = np.iinfo(np.int64).max


def build_model(swept: Artefact, instance: SDPointInstance) -> onnx.ModelProto:
    """Builds the model of an instance, its weights inside: `images`, uint8 [batch, H, W, C], to `logits` [batch, K].

    Args:
        swept: the artefact.
        instance: one that was swept.
    """
    net = create_model(swept.model, swept.num_classes).architecture
    graph = _Graph({"": params_for(swept.params, instance), "statistics/": swept.batch_stats[instance]})
    _Net(net, graph, instance).emit(swept)
    height, width, channels = swept.image_shape
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", height, width, channels])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", swept.num_classes])
    made = helper.make_graph(graph.nodes, f"{swept.model} {instance.name}", [images], [logits], graph.tensors)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="sdpoint_jax"
    )
    helper.set_model_props(model, {"instance": instance.name, "class_names": json.dumps(swept.class_names)})
    return model


def lay_out(swept: Artefact) -> dict[str, np.ndarray]:
    """Copies the parameters that all instances share as the graphs take them; by the names that they have there."""
    shared = traverse_util.flatten_dict(params_for(swept.params, FULL_RESOLUTION), sep="/")
    return {name: channels_first(array) for name, array in shared.items()}


def without_own(swept: Artefact, instance: SDPointInstance, by_name: Mapping[str, Value]) -> dict[str, Value]:
    """Returns the entries, by the parameters' names, but for those of parameters that an instance has for itself."""
    own = traverse_util.flatten_dict(own_params(swept.params, instance), sep="/")
    return {name: value for name, value in by_name.items() if name not in own}


def refer_to_file(model: onnx.ModelProto, file: str, places: Mapping[str, tuple[int, int]]) -> None:
    """Replaces tensors that a model holds by where they are in a file.

    Args:
        model: is changed.
        file: its name.
        places: by the tensor's name, its offset and its length in bytes.
    """
    for tensor in model.graph.initializer:
        if tensor.name in places:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            offset, length = places[tensor.name]
            for key, value in {"location": file, "offset": offset, "length": length}.items():
                tensor.external_data.add(key=key, value=str(value))


class _Graph:
    """The nodes and tensors of a model, in order."""

    def __init__(self, variables: Mapping[str, Any]):
        """Takes nested dicts of arrays, by the prefix of their tensors' names."""
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._variables = {
            prefix + name: array
            for prefix, tree in variables.items()
            for name, array in traverse_util.flatten_dict(tree, sep="/").items()
        }

    def add(self, kind: str, *inputs: str, name: str = "", **attributes) -> str:
        """Adds a node, of the `name` that its output gets; returns that."""
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """Adds a tensor; returns its name."""
        name = name or f"constant_{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def variable(self, name: str) -> str:
        """Adds the parameter or statistic of that name; returns it."""
        return self.constant(channels_first(self._variables[name]), name)


def _strided(size: Size, stride: int) -> Size:
    return -(-size[0] // stride), -(-size[1] // stride)


def _downsampled(size: Size, ratio: float) -> Size:
    return downsampled_size(size[0], ratio), downsampled_size(size[1], ratio)


class _Feature(NamedTuple):
    """A feature map [batch, channels, height, width]."""

    name: str
    channels: int
    size: Size

    def resized(self, name: str, size: Size) -> "_Feature":
        """Returns the feature map that a node makes of this one, with as many channels."""
        return _Feature(name, self.channels, size)


class _Net:
    """Adds the layers of one instance to a graph; the order is that of `models.resnet` and `models.blocks`."""

    def __init__(self, architecture: Architecture, graph: _Graph, instance: SDPointInstance):
        self._net, self._graph, self._instance = architecture, graph, instance

    def emit(self, swept: Artefact) -> None:
        """Adds everything from `images` to `logits`."""
        x = self._convolution(self._normalized(swept), self._net.stem_convolution, "stem/conv")
        if self._net.stem_has_norm:
            x = self._relu(self._norm(x, "stem/norm"))
        if self._net.imagenet_stem:
            x = self._stem_pool(x)
        for k, spec in enumerate(self._net.blocks(), 1):
            block = self._preactivation_block if self._net.preactivation else self._postactivation_block
            x = self._pass_point(block(x, spec, f"block_{k:02d}"), k)
        self._head(x)

    def _normalized(self, swept) -> _Feature:
        height, width, channels = swept.image_shape
        mean, std = np.array(swept.mean, np.float32), np.array(swept.std, np.float32)
        x = self._graph.add("Cast", "images", to=TensorProto.FLOAT)
        x = self._graph.add("Div", x, self._graph.constant(np.array(255, np.float32)))
        x = self._graph.add("Div", self._graph.add("Sub", x, self._graph.constant(mean)), self._graph.constant(std))
        return _Feature(self._graph.add("Transpose", x, perm=(0, 3, 1, 2)), channels, (height, width))

    def _convolution(self, x: _Feature, spec: ConvolutionSpec, name: str) -> _Feature:
        kernel = self._graph.variable(f"{name}/kernel")
        attributes = dict(
            kernel_shape=[spec.kernel] * 2, strides=[spec.stride] * 2, pads=[spec.kernel // 2] * 4, group=spec.groups
        )
        y = self._graph.add("Conv", x.name, kernel, name=name, **attributes)
        return _Feature(y, spec.features, _strided(x.size, spec.stride))

    def _norm(self, x: _Feature, name: str) -> _Feature:
        wanted = (f"{name}/scale", f"{name}/bias", f"statistics/{name}/mean", f"statistics/{name}/var")
        variables = map(self._graph.variable, wanted)
        y = self._graph.add("BatchNormalization", x.name, *variables, name=name, epsilon=NORM_EPSILON)
        return x.resized(y, x.size)

    def _relu(self, x: _Feature) -> _Feature:
        return x.resized(self._graph.add("Relu", x.name), x.size)

    def _postactivation_block(self, x: _Feature, spec: BlockSpec, name: str) -> _Feature:
        y = x
        for index, convolution in enumerate(spec.convolutions, 1):
            y = self._norm(self._convolution(y, convolution, f"{name}/conv{index}"), f"{name}/norm{index}")
            if index < len(spec.convolutions):
                y = self._relu(y)
        if spec.shortcut:
            x = self._shortcut(x, spec.shortcut, name)
        return y.resized(self._graph.add("Add", x.name, y.name), y.size)

    def _preactivation_block(self, x: _Feature, spec: BlockSpec, name: str) -> _Feature:
        y = x
        for index, convolution in enumerate(spec.convolutions, 1):
            y = self._relu(self._norm(y, f"{name}/norm{index}"))
            if index == 1 and spec.shortcut:
                x = self._shortcut(y, spec.shortcut, name)
            y = self._convolution(y, convolution, f"{name}/conv{index}")
        return y.resized(self._graph.add("Add", x.name, y.name), y.size)

    def _shortcut(self, x: _Feature, spec: ShortcutSpec, name: str) -> _Feature:
        if spec.kind == "padded_identity":
            return self._padded_identity(x, spec.convolution)
        x = self._convolution(x, spec.convolution, f"{name}/shortcut_conv")
        return x if spec.kind == "projection" else self._norm(x, f"{name}/shortcut_norm")

    def _padded_identity(self, x: _Feature, spec: ConvolutionSpec) -> _Feature:
        slices = ([0, 0], [_END, _END], [2, 3], [spec.stride] * 2)  # Starts, ends, axes, steps.
        y = self._graph.add("Slice", x.name, *(self._graph.constant(np.array(part)) for part in slices))
        missing = spec.features - x.channels
        pads = np.array([0, missing // 2, 0, 0, 0, missing - missing // 2, 0, 0])
        y = self._graph.add("Pad", y, self._graph.constant(pads))
        return _Feature(y, spec.features, _strided(x.size, spec.stride))

    def _pass_point(self, x: _Feature, point: int) -> _Feature:
        if point == self._instance.point:
            x = self._pool(x, _downsampled(x.size, self._instance.ratio), "AveragePool")
        return x if self._net.preactivation else self._relu(x)

    def _stem_pool(self, x: _Feature) -> _Feature:
        size = _strided(x.size, 2)
        if self._instance.point == STEM:
            return self._pool(x, _downsampled(size, self._instance.ratio), "MaxPool")
        return x.resized(self._graph.add("MaxPool", x.name, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), size)

    def _pool(self, x: _Feature, size: Size, kind: str) -> _Feature:
        """Adds an adaptive pool; as an ordinary one of that `kind` where the windows are alike."""
        if all(side % out == 0 for side, out in zip(x.size, size)):
            kernel = [side // out for side, out in zip(x.size, size)]
            return x.resized(self._graph.add(kind, x.name, kernel_shape=kernel, strides=kernel), size)
        along = self._averages if kind == "AveragePool" else self._maxima
        name = x.name
        for axis in (2, 3):
            name = along(name, axis, x.size[axis - 2], size[axis - 2])
        return x.resized(name, size)

    def _averages(self, name: str, axis: int, size: int, out: int) -> str:
        matrix = averaging_matrix(size, out)
        if axis == 2:
            return self._graph.add("MatMul", self._graph.constant(matrix), name)
        return self._graph.add("MatMul", name, self._graph.constant(matrix.T))

    def _maxima(self, name: str, axis: int, size: int, out: int) -> str:
        cells = [self._graph.constant(indices) for indices in window_cells(size, out)]
        return self._graph.add("Max", *(self._graph.add("Gather", name, indices, axis=axis) for indices in cells))

    def _head(self, x: _Feature) -> None:
        if self._net.preactivation:
            x = self._relu(self._norm(x, "head/norm"))
        mean = self._graph.add("Flatten", self._graph.add("GlobalAveragePool", x.name))
        kernel, bias = (self._graph.variable(f"head/dense/{leaf}") for leaf in ("kernel", "bias"))
        self._graph.add("Gemm", mean, kernel, bias, name="logits", transB=1)
