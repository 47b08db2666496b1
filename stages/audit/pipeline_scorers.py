"""The pipeline's scorers prepared for the audit: factory, boundaries, and a variant with permuted ids."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from stages.audit.audit_scorer import ScorerFactory
from stages.audit.checks.metamorphic import Variants
from stages.audit.sampling import Boundaries
from stages.common.bpb import ByteTable
from stages.common.parallel import World
from stages.common.scorer import Scorer
from stages.scoring.evaluate import ScorerInputs
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Model
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import TttEvalParams


class AuditedScorer(NamedTuple):
    """One scorer of the pipeline, prepared for the audit."""

    factory: ScorerFactory
    boundaries: Boundaries
    variants: Variants


def build_scorers(
    model: Model,
    sliding: SlidingEvalParams,
    ttt: TttEvalParams,
    world: World,
    table: ByteTable,
    n_targets: int,
) -> dict[str, AuditedScorer]:
    """Prepare both scorers, by the name of their stage."""

    chunk = ttt.chunk if ttt.kind == "sgd" else None
    boundaries = {
        "sliding_eval": Boundaries(window=sliding.stride, chunk=None),
        "ttt_eval": Boundaries(window=sliding.stride, chunk=chunk),
    }
    inputs = ScorerInputs(model, world, table, n_targets)
    scorers = {}
    for name in boundaries:
        build = functools.partial(build_scorer, name, sliding, ttt)
        scorers[name] = _prepare(build, boundaries[name], inputs)
    return scorers


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


def _prepare(
    build: Callable[[ScorerInputs], Scorer], boundaries: Boundaries, inputs: ScorerInputs
) -> AuditedScorer:
    def with_targets(n_targets: int) -> Scorer:
        return build(inputs._replace(n_targets=n_targets))

    def with_permuted_ids(permutation: np.ndarray) -> Scorer:
        model = permute_model_ids(inputs.model, permutation)
        return build(inputs._replace(model=model, table=permute_table_ids(inputs.table, permutation)))

    return AuditedScorer(
        factory=with_targets,
        boundaries=boundaries,
        variants=Variants(permuted_ids=with_permuted_ids),
    )
