"""Float32 arrays in a memory mapping that several processes share."""

import math
import mmap
from collections.abc import Mapping

import numpy as np


def array_views(memory: mmap.mmap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Views of `memory` as float32 arrays of these shapes, one after another, in their order."""
    rest = np.frombuffer(memory, np.float32)
    views = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        views[name] = rest[:size].reshape(shape)
        rest = rest[size:]
    return views
