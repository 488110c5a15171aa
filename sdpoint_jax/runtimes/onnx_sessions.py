"""The other runtime: SDPoint instances in onnxruntime, on a CPU. Needs the extra: pip install 'sdpoint_jax[onnx]'.

Imports neither onnx nor onnxruntime before the first session is opened.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from sdpoint_jax.instance import SDPointInstance
from sdpoint_jax.storage.artefact import Artefact
from sdpoint_jax.storage.device import count_threads

LIBRARIES = ("onnx", "onnxruntime")


def check_onnxruntime(dtype: str, devices: Sequence[jax.Device]) -> None:
    """Checks that onnxruntime may take the place of XLA.

    Args:
        dtype: of the net's computation.
        devices: that it is to run on.

    Raises:
        ImportError: it is not installed; names the extra.
        ValueError: it would compute something else, or elsewhere.
    """
    if missing := [name for name in LIBRARIES if not importlib.util.find_spec(name)]:
        raise ImportError(f"runtime onnxruntime: needs {' and '.join(missing)}, pip install 'sdpoint_jax[onnx]'")
    if dtype != "float32":
        raise ValueError(f"runtime onnxruntime: computes in float32, but the net in {dtype}; valid is xla")
    if len(devices) > 1 or devices[0].platform != "cpu":
        raise ValueError(f"runtime onnxruntime: runs on one CPU, not on {', '.join(map(str, devices))}; valid is xla")


@functools.cache
def _share_arena():
    """Lets the sessions of this process take the memory of activations from one place, not each from its own."""
    import onnxruntime as ort

    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, None)


class OnnxSessions:
    """Sessions of a net's instances: `sessions[instance](images)` gives logits for a batch of any size.

    A session is opened on first use or ahead of time, once, and runs in as many threads as XLA's programs. They share
    the parameters as they are, and the memory of activations. Each holds a copy of its own of the kernels in the order,
    and with the statistics folded in, that make it fast: for PreResNet-50 it takes 102 MB, where one that shares
    nothing takes 199 MB and as much time for a batch. Any number of threads may use the sessions.
    """

    def __init__(self, swept: Artefact):
        """Takes the artefact; opens nothing yet."""
        self._swept = swept
        self._weights: dict[bytes, tuple] = {}  # By digest: the array, and the same as onnxruntime has it.
        self._programs: dict[SDPointInstance, Callable[[ArrayLike], np.ndarray]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, instance: SDPointInstance) -> Callable[[ArrayLike], np.ndarray]:
        """Returns what computes logits [B, K], float32, of uint8 images [B, H, W, C]; opens the session if needed."""
        if instance not in self._programs:
            self.open([instance])
        return self._programs[instance]

    def __contains__(self, instance: SDPointInstance) -> bool:
        """Tells whether the session of `instance` is open."""
        return instance in self._programs

    def __iter__(self) -> Iterator[SDPointInstance]:
        """Iterates over the instances whose sessions are open."""
        return iter(tuple(self._programs))

    def __len__(self) -> int:
        """Counts the sessions that are open."""
        return len(self._programs)

    def open(self, instances: Iterable[SDPointInstance]) -> None:
        """Opens the sessions of instances that are not open yet."""
        for instance in instances:
            with self._lock:
                if instance not in self._programs:
                    self._programs[instance] = self._open(instance)

    def _open(self, instance):
        import onnxruntime

        from sdpoint_jax.interop.onnx_graph import build_graph, digest, refer_to_file

        model, arrays = build_graph(self._swept, instance)
        weights = {}
        for name, array in arrays.items():
            key = digest(array)
            if key not in self._weights:
                array = np.ascontiguousarray(array)  # An OrtValue does not keep it.
                self._weights[key] = array, onnxruntime.OrtValue.ortvalue_from_numpy(array)
            _, weights[name] = self._weights[key]
        # In a file that does not exist: the values that the session is given take its place.
        refer_to_file(model, "weights", {name: (0, array.nbytes) for name, array in arrays.items()})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = count_threads()
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Else its threads spin on after a call, and take the cores from the next session: switching doubled the time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_external_initializers(list(weights), list(weights.values()))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def run(images: ArrayLike) -> np.ndarray:
            return session.run(["logits"], {"images": np.asarray(images)})[0]

        return run
