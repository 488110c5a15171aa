"""ONNX graphs (opset 17) of SDPoint instances, read off the trace of the network; see `programs.onnx_emitter`.

They compute in float32 whatever the network computes in. Tensors of more than one axis, such as kernels, are in a file
or in memory, shared by the graphs of all instances; scales and shifts, which are an instance's own, are in its graph.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.interop.inference_trace import BATCH, trace_inference
from sdpoint_jax.interop.onnx_emitter import Emitter
from sdpoint_jax.storage.artefact import Artefact

OPSET, IR_VERSION = 17, 8  # Of the year 2022: what every runtime in use reads.


class Graph(NamedTuple):
    """Graph of an instance and its weights.

    Attributes:
        model: `images`, uint8 [batch, H, W, C], to `logits` [batch, K]. Its weights have no data.
        weights: Tensors of more than one axis, by their names; views of the artefact's arrays where they can be.
    """

    model: onnx.ModelProto
    weights: dict[str, np.ndarray]


def build_graph(swept: Artefact, instance: SDPointInstance) -> Graph:
    """Build the graph of an instance.

    Args:
        swept: The artefact.
        instance: One that was swept.

    Raises:
        ValueError: ONNX has no form of a primitive; names it and the module.
    """
    emitter = Emitter()
    emitter.emit(trace_inference(swept, instance), "logits")
    taken = helper.make_tensor_value_info("images", TensorProto.UINT8, (BATCH, *swept.image_shape))
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [BATCH, swept.num_classes])
    made = helper.make_graph(emitter.nodes, f"{swept.model} {instance.name}", [taken], [given], emitter.tensors)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="sdpoint_jax"
    )
    helper.set_model_props(model, {"instance": instance.name, "class_names": json.dumps(swept.class_names)})
    return Graph(model, emitter.weights)


def build_model(swept: Artefact, instance: SDPointInstance) -> onnx.ModelProto:
    """Build the graph of an instance with its weights inside; see `build_graph`."""
    model, weights = build_graph(swept, instance)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.raw_data = weights[tensor.name].tobytes()
    return model


def refer_to_file(model: onnx.ModelProto, file: str, places: Mapping[str, tuple[int, int]]) -> None:
    """Say in which file the weights of a model are.

    Args:
        model: Is changed.
        file: Its name.
        places: By the tensor's name, its offset and its length in bytes.
    """
    for tensor in model.graph.initializer:
        if tensor.name in places:
            tensor.data_location = TensorProto.EXTERNAL
            offset, length = places[tensor.name]
            for key, value in {"location": file, "offset": offset, "length": length}.items():
                tensor.external_data.add(key=key, value=str(value))


def digest(array: np.ndarray) -> bytes:
    """Return what only arrays of the same elements, shape and type have in common."""
    content = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    content.update(np.ascontiguousarray(array).data)
    return content.digest()
