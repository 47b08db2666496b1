"""Factory of the pipeline's own scorers, for the process in the sandbox that the audit asks.

The audit names `pipeline_factory:build` and its arguments; this module runs in that process alone.
"""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stages.audit.pipeline_scorers import MODEL_PARAMETERS
from stages.common import config
from stages.common.bpb import ByteTable, byte_table, load_tokenizer
from stages.common.parallel import World, distributed
from stages.common.scorer import Scorer
from stages.scoring.evaluate import ScorerInputs
from stages.train.model import Model, build_model
from stages.train.params import ModelParams
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import Params


class Loaded(NamedTuple):
    """Everything that all scorers of the process share."""

    params: Params
    world: World
    model: Model
    table: ByteTable


def build(
    n_targets: int,
    name: str,
    weights_file: str,
    tokenizer_file: str,
    sections: str,
    permutation: np.ndarray | None = None,
) -> Scorer:
    """Build the scorer of the stage `name`, sliding_eval or ttt_eval, over the packed model's weights.

    weights_file: as pipeline_scorers.decode_model writes it. sections: the parameter sections parallel,
    sliding_eval and ttt_eval as JSON. permutation: (V,), the same scorer with id a renamed to
    permutation[a].
    """
    params, world, model, table = _load(weights_file, tokenizer_file, sections)
    if permutation is not None:
        model = permute_model_ids(model, permutation)
        table = permute_table_ids(table, permutation)
    inputs = ScorerInputs(model, world, table, n_targets)
    return build_scorer(name, params.sliding_eval, params.ttt_eval, inputs)


def permute_model_ids(model: Model, permutation: np.ndarray) -> Model:
    """Copy a model and rename id a to permutation[a], (V,).

    The rows of its embedding tables are reordered; nothing else changes.
    """
    permuted = copy.deepcopy(model)
    order = torch.from_numpy(np.argsort(permutation)).to(model.embedding.weight.device)
    with torch.no_grad():
        for table in (permuted.embedding, *permuted.value_tables):
            table.weight.copy_(table.weight[order])
    permuted.params = dataclasses.replace(model.params, bos_id=int(permutation[model.params.bos_id]))
    if permuted.smear is not None:
        permuted.smear.bos_id = permuted.params.bos_id
    return permuted


def permute_table_ids(table: ByteTable, permutation: np.ndarray) -> ByteTable:
    """Copy a byte table and rename id a to permutation[a], (V,)."""
    order = np.argsort(permutation)
    texts = tuple(table.texts[i] for i in order.tolist())
    return ByteTable(texts, table.leading_space[order], table.boundary[order], int(permutation[table.bos]))


@functools.lru_cache(maxsize=1)
def _load(weights_file: str, tokenizer_file: str, sections: str) -> Loaded:
    """Set up the device and load the model, once in the life of the process."""
    params = config.build(json.loads(sections), Params)
    world = distributed(params.parallel).__enter__()  # for the rest of the process's life
    with safe_open(weights_file, framework="pt") as file:
        model_params = config.build(json.loads(file.metadata()[MODEL_PARAMETERS]), ModelParams)
    model = build_model(model_params, world)
    model.load_state_dict(load_file(weights_file))
    return Loaded(params, world, model, byte_table(load_tokenizer(Path(tokenizer_file))))
