"""Arrays as PyTorch and ONNX lay them out."""

import numpy as np

_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # From HWIO and IO to OIHW and OI.


def channels_first(array: np.ndarray) -> np.ndarray:
    """Copies a kernel [h, w, in, out] to [out, in, h, w], a matrix [in, out] to [out, in], a vector as it is."""
    array = np.asarray(array)
    return np.ascontiguousarray(array.transpose(_AXES[array.ndim]))
