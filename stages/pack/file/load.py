"""Loads a model file that another process decodes (decode_process.py), and checks its header."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.common.config import build
from stages.pack.file import shared_memory
from stages.pack.file.decode_process import DecodeProcess
from stages.train.model import Model
from stages.train.params import ModelParams

# Limits of the model parameters that a header may declare, far above any real model.
MAX_PARAMETER = 1 << 24  # largest integer
MAX_VISITS = 100_000  # block visits in one forward pass, loops included


class PendingModel:
    """A model file that is being decoded: `params` are known at once, the weights after `wait`.

    Raises ValueError for a file that cannot be read, is damaged, or holds an impossible model.
    """

    def __init__(self, path: Path, decoder: DecodeProcess | None = None) -> None:
        self._decoder = decoder or DecodeProcess()
        model, self._shapes = self._decoder.request(path)
        self.params = params_from_header(model, self._shapes)

    def wait(self) -> dict[str, Tensor]:
        """Block until the weights are decoded and return them, float32.

        Raises ChildProcessError if the child has died.
        """
        self._decoder.wait()
        views = shared_memory.array_views(self._decoder.memory, self._shapes)
        return {name: torch.from_numpy(weights) for name, weights in views.items()}


@dataclasses.dataclass(frozen=True)
class _Header:
    model: ModelParams


def params_from_header(model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelParams:
    """Check the model parameters in a header against the file's tensors.

    Raises ValueError unless names and shapes agree.
    """
    params = _bounded_params(model)
    try:
        check_shapes(shapes, params)
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    return params


def check_shapes(shapes: Mapping[str, tuple[int, ...]], params: ModelParams) -> None:
    """Raise ValueError unless `shapes` are the names and shapes of a model with `params`.

    Allocates no weights.
    """
    if params.layers > len(shapes):
        raise ValueError(f"{len(shapes)} tensors are too few for the {params.layers} blocks of model.layers")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Model(params).state_dict().items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            found = _describe_shape(name, shapes)
            wanted = _describe_shape(name, expected)
            raise ValueError(
                f"tensor {name} {found}, and {wanted} in a model with these parameters (section model)"
            )


def _describe_shape(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"has shape {shapes[name]}" if name in shapes else "is absent"


def _bounded_params(model: Mapping[str, Any]) -> ModelParams:
    """Parse the model parameters in a header; rejects values that would take long to check."""
    try:
        params = build({"model": model}, _Header).model
    except ValueError as error:
        raise ValueError(f"damaged model file: {error}") from error
    if any(type(value) is int and value > MAX_PARAMETER for value in model.values()):
        raise ValueError(f"damaged model file: a parameter of the model is above {MAX_PARAMETER}")
    if params.layers + params.loops * (params.loop_last + 1 - params.loop_first) > MAX_VISITS:
        raise ValueError(f"damaged model file: its model visits more than {MAX_VISITS} blocks")
    return params
