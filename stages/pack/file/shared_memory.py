"""Float32 arrays in memory that several processes see."""

import math
import mmap
from collections.abc import Mapping

import numpy as np


def arrays(memory: mmap.mmap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes, one after another."""
    left, made = np.frombuffer(memory, np.float32), {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        made[name], left = left[:size].reshape(shape), left[size:]
    return made
