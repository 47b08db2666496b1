"""The pipeline's own scorers as the audit takes them: a factory, where their machinery changes gear, and other names for their ids."""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from stages.audit.audit_scorer import Factory
from stages.audit.checks.metamorphic import Variants
from stages.audit.sampling import Edges
from stages.common.bpb import ByteTable
from stages.common.parallel import World
from stages.common.scorer import Scorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.train.model import Model
from stages.ttt_eval.build import scorer_for
from stages.ttt_eval.params import TttEvalParams


class Own(NamedTuple):
    """One of them."""

    factory: Factory
    edges: Edges
    variants: Variants


Make = Callable[[Model, ByteTable, int], Scorer]


def scorers(
    model: Model,
    sliding: SlidingEvalParams,
    ttt: TttEvalParams,
    here: World,
    table: ByteTable,
    n_targets: int,
) -> dict[str, Own]:
    """All of them, by the name of their stage."""
    made: dict[str, tuple[Make, Edges]] = {
        "sliding_eval": (
            lambda model, _, __: SlidingScorer(model, sliding, here),
            Edges(window=sliding.stride, chunk=None),
        ),
        "ttt_eval": (
            lambda model, table, targets: scorer_for(model, sliding, ttt, here, table, targets),
            Edges(window=sliding.stride, chunk=ttt.chunk if ttt.kind == "sgd" else None),
        ),
    }
    return {name: _own(make, edges, model, table, n_targets) for name, (make, edges) in made.items()}


def _own(make: Make, edges: Edges, model: Model, table: ByteTable, n_targets: int) -> Own:
    return Own(
        factory=lambda targets: make(model, table, targets),
        edges=edges,
        variants=Variants(
            relabelled=lambda names: make(relabelled(model, names), respelled(table, names), n_targets)
        ),
    )


def relabelled(model: Model, names: np.ndarray) -> Model:
    """A model that calls id a names[a], (V,): the rows of its tables in another order, and nothing else."""
    twin = copy.deepcopy(model)
    order = torch.from_numpy(np.argsort(names)).to(model.embedding.weight.device)
    with torch.no_grad():
        for table in (twin.embedding, *twin.value_tables):
            table.weight.copy_(table.weight[order])
    twin.params = dataclasses.replace(model.params, bos_id=int(names[model.params.bos_id]))
    if twin.smear is not None:
        twin.smear.bos_id = twin.params.bos_id
    return twin


def respelled(table: ByteTable, names: np.ndarray) -> ByteTable:
    """The table of a tokenizer that calls id a names[a], (V,)."""
    order = np.argsort(names)
    texts = tuple(table.texts[i] for i in order.tolist())
    return ByteTable(texts, table.leading_space[order], table.boundary[order], int(names[table.bos]))
