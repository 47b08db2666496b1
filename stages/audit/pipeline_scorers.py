"""The pipeline's scorers prepared for the audit: factory, boundaries, and a variant with permuted ids."""

import copy
import dataclasses
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
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import Model
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import TttEvalParams

Builder = Callable[[Model, ByteTable, int], Scorer]  # the int is the number of targets


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

    def build_sliding(model: Model, table: ByteTable, n_targets: int) -> Scorer:
        return SlidingScorer(model, sliding, world)

    def build_ttt(model: Model, table: ByteTable, n_targets: int) -> Scorer:
        return build_scorer(model, sliding, ttt, world, table, n_targets)

    chunk = ttt.chunk if ttt.kind == "sgd" else None
    without_chunks = Boundaries(window=sliding.stride, chunk=None)
    with_chunks = Boundaries(window=sliding.stride, chunk=chunk)
    return {
        "sliding_eval": _prepare(build_sliding, without_chunks, model, table, n_targets),
        "ttt_eval": _prepare(build_ttt, with_chunks, model, table, n_targets),
    }


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
    build: Builder, boundaries: Boundaries, model: Model, table: ByteTable, n_targets: int
) -> AuditedScorer:
    def with_permuted_ids(permutation: np.ndarray) -> Scorer:
        return build(permute_model_ids(model, permutation), permute_table_ids(table, permutation), n_targets)

    return AuditedScorer(
        factory=lambda targets: build(model, table, targets),
        boundaries=boundaries,
        variants=Variants(permuted_ids=with_permuted_ids),
    )
