"""A small model, its Hessians and parameters to pack it, for tests of pack and of readers of model.bin."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from stages.calibrate.hessians import hessian_name, importance_name
from stages.common.progress import Logger
from stages.pack.file.stream_encoder import InProcessEncoder
from stages.pack.params import PackParams
from stages.pack.quantise import tensor_kinds
from stages.train.model import Model, initialise_
from stages.train.params import ModelParams

MODEL = ModelParams(
    vocab_size=96,
    context=16,
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    hidden=64,
    attention="windows",
    bos_id=1,
    rope_dims=4,
    rope_base=1.0e4,
    logit_softcap=30.0,
    query_gain=5.25,
    parallel_from=2,
    loop_first=1,
    loop_last=1,
    loops=2,
    gate_width=3,
    smear_width=0,
    value_tables=1,
    embedding_std=0.005,
)
PACK = PackParams(
    quantiser="sdclip",
    codec="brotli",
    states=8,
    rate_weight=0.1,
    row_weight=0.5,
    matrix_bits=6,
    embedding_bits=8,
    attention_clip=12.85,
    mlp_clip=12.85,
    embedding_clip=20.0,
    lqer_rank=0,
    lqer_tensors=2,
    awq_groups=0,
    damping=0.01,
    block_columns=16,
    brotli_quality=11,
    budget_bytes=1_000_000,
    code_reserve_bytes=1_000,
)
AT_RATE = dataclasses.replace(PACK, quantiser="rate", codec="adaptive")
CORRECTED: dict[str, Any] = {"lqer_rank": 2, "lqer_tensors": 3}
ENCODER = InProcessEncoder()
SILENT = Logger(is_main=False)


def trained_like() -> dict[str, Tensor]:
    """A state with no zero matrix and no constant vector, as training leaves it."""
    model = Model(MODEL)
    initialise_(model, 7)
    generator = torch.Generator().manual_seed(8)
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.clone() + 0.02 * torch.randn(tensor.shape, generator=generator)
    return state


def hessians_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hessians of correlated inputs, one for all matrices of one input, and the importance of all rows."""
    generator = torch.Generator().manual_seed(9)
    made = {}
    for name in sorted(state):
        if tensor_kinds.kind_of(name) == "rest":
            continue
        rows, columns = state[name].shape
        if hessian_name(name) == name:
            independent = torch.randn(3 * columns, columns, generator=generator)
            inputs = independent @ torch.randn(columns, columns, generator=generator)
            made[name] = inputs.T @ inputs / len(inputs)
        made[importance_name(name)] = torch.rand(rows, generator=generator) * 1.0e-4
    return made


def with_budget(budget_bytes: int, params: PackParams = PACK) -> PackParams:
    """Parameters that allow `budget_bytes` for model.bin."""
    return dataclasses.replace(params, budget_bytes=budget_bytes + params.code_reserve_bytes)
