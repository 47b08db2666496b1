"""A model file decoded by another process (decode_process.py), while this one gets ready to use its weights; and what its header may
declare."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.common.config import build
from stages.pack.file import shared_memory
from stages.pack.file.decode_process import Decoder
from stages.train.model import Model
from stages.train.params import ModelParams

MAX_SIZE = 1 << 24  # of an integer among the model's parameters that a file may declare
MAX_VISITS = 100_000  # of blocks in one forward pass, likewise


class Unpacking:
    """The parameters of the model in a file, at once, and its weights, later; a ValueError for a file that is damaged or not lawful."""

    def __init__(self, path: Path, decoder: Decoder | None = None) -> None:
        self._decoder = decoder or Decoder()
        model, self._shapes = self._decoder.hear(path)
        self.params = model_params(model, self._shapes)

    def state(self) -> dict[str, Tensor]:
        """The float32 weights, once they are there. A ChildProcessError when the other process was killed."""
        self._decoder.hear()
        return {
            name: torch.from_numpy(weights)
            for name, weights in shared_memory.arrays(self._decoder.memory, self._shapes).items()
        }


@dataclasses.dataclass(frozen=True)
class _Header:
    model: ModelParams


def model_params(model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelParams:
    """The parameters of the model in a file; a ValueError unless its tensors have the names and shapes of such a model's."""
    params = _within_reason(model)
    try:
        check_shapes(shapes, params)
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    return params


def check_shapes(shapes: Mapping[str, tuple[int, ...]], params: ModelParams) -> None:
    """A ValueError unless `shapes` are the names and shapes of a model with `params`; allocates nothing."""
    if params.layers > len(shapes):
        raise ValueError(f"{len(shapes)} tensors are too few for the {params.layers} blocks of model.layers")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Model(params).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            seen, wanted = (
                f"has shape {of[name]}" if name in of else "is absent" for of in (shapes, expected)
            )
            raise ValueError(
                f"tensor {name} {seen}, and {wanted} in a model with these parameters (section model)"
            )


def _within_reason(model: Mapping[str, Any]) -> ModelParams:
    """The model's parameters in a header, within what the file's tensors could possibly need."""
    try:
        params = build({"model": model}, _Header).model
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    if any(type(value) is int and value > MAX_SIZE for value in model.values()):
        raise ValueError(f"damaged model file: a parameter of the model is above {MAX_SIZE}")
    if params.layers + params.loops * (params.loop_last + 1 - params.loop_first) > MAX_VISITS:
        raise ValueError(f"damaged model file: its model visits more than {MAX_VISITS} blocks")
    return params
