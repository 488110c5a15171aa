"""OpenCV, where it is installed."""

import functools
import types


@functools.cache
def opencv() -> types.ModuleType | None:
    """Returns the `cv2` module, or None: PIL then does its work, more slowly."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)  # The pipeline's own threads and processes are the parallelism.
    return cv2
