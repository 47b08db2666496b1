"""Scores that a network computes for each target: its loss, and on request more from the same logits.

An n-gram tilt needs the probability of a hinted token, a byte mixture the logits of the decisions on
the target's path through the byte tree. `Queries` asks for them and `TargetScores` holds them. A
query depends on nothing but tokens before its target.

Shapes: N targets, D decisions of the longest path, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from stages.common.scorer import TimedScorer
from stages.scoring.byte_tree_logits import DeviceByteTrees
from stages.train.model import Model
from stages.train.reference import softcapped

A = TypeVar("A")  # np.ndarray on the host, Tensor on the device of a forward pass
B = TypeVar("B")


class Queries(NamedTuple, Generic[A]):
    """Requests for each of N targets."""

    hint_ids_N: A  # int64: the token whose probability is wanted, or NO_HINT
    tree_ids_N: A  # int64: the target's byte tree (byte_tree.tree_index_after)
    byte_trees: DeviceByteTrees | None  # None: no path logits are wanted

    def map(self, function: Callable[[A], B]) -> "Queries[B]":
        """Apply `function`, which selects, rearranges or moves, to both arrays of ids."""
        return Queries(function(self.hint_ids_N), function(self.tree_ids_N), self.byte_trees)


class TargetScores(NamedTuple, Generic[A]):
    """Scores of N targets, float32; the last axis of every array is that of the targets."""

    nll_N: A  # loss, nats
    hint_logp_N: A | None = None  # log-probability of the hinted token; with queries
    # With byte trees: the hinted token's logit against all others, from exact sums, and the logits
    # of the decisions on the target's path in the distribution without the hint.
    hint_logit_N: A | None = None
    path_logits_DN: A | None = None

    def map(self, function: Callable[[A], B]) -> "TargetScores[B]":
        """Apply `function` to every array that is there."""

        def optional(values: A | None) -> B | None:
            return None if values is None else function(values)

        return TargetScores(
            nll_N=function(self.nll_N),
            hint_logp_N=optional(self.hint_logp_N),
            hint_logit_N=optional(self.hint_logit_N),
            path_logits_DN=optional(self.path_logits_DN),
        )

    def write_(self, first: int, scores: "TargetScores[A]") -> None:
        """Write the scores of consecutive targets, from target `first` on."""
        values: Any
        new_values: Any
        for values, new_values in zip(self, scores, strict=True):
            if values is not None:
                values[..., first : first + new_values.shape[-1]] = new_values


class NetworkScorer(TimedScorer, Protocol):
    """A scorer that computes the answers to queries in the same forward pass as the losses."""

    def score(self, tokens: np.ndarray, queries: Queries[np.ndarray] | None) -> TargetScores[np.ndarray]:
        """Score and observe tokens (N,) in order, as `score_stream` does; one query for each target."""
        ...

    def fork(self) -> "NetworkScorer":
        """An independent copy."""
        ...


def zero_scores(
    targets: int, queries: Queries[np.ndarray] | None, zeros: Callable[[tuple[int, ...]], A]
) -> TargetScores[A]:
    """Scores of zero with an array for everything that is queried; `zeros` makes one of a shape."""
    scores = TargetScores(zeros((targets,)))
    if queries is not None:
        scores = scores._replace(hint_logp_N=zeros((targets,)))
    if queries is not None and queries.byte_trees is not None:
        path_logits_DN = zeros((queries.byte_trees.longest_path, targets))
        scores = scores._replace(hint_logit_N=zeros((targets,)), path_logits_DN=path_logits_DN)
    return scores


def concatenate(parts: Sequence[TargetScores[np.ndarray]]) -> TargetScores[np.ndarray]:
    """Join the scores of consecutive targets, at least one part, all with the same arrays."""
    ends = np.cumsum([0, *(len(part.nll_N) for part in parts)])
    whole = parts[0].map(lambda values: np.empty((*values.shape[:-1], ends[-1]), values.dtype))
    for first, part in zip(ends[:-1].tolist(), parts, strict=True):
        whole.write_(first, part)
    return whole


def score_targets(
    model: Model, z_NV: Tensor, targets_N: Tensor, queries: Queries[Tensor] | None
) -> TargetScores[Tensor]:
    """Compute the scores from logits before the softcap.

    Only the loss has a useful gradient.
    """
    softcap = model.params.logit_softcap
    nll_N = model.ops.cross_entropy(z_NV, targets_N, softcap)
    if queries is None:
        return TargetScores(nll_N)

    # log p(hint) = log p(target) + (logit of the hint - logit of the target)
    hints_N = queries.hint_ids_N
    logit_at_target_N = softcapped(z_NV.gather(1, targets_N[:, None])[:, 0], softcap)
    logit_at_hint_N = softcapped(z_NV.gather(1, hints_N.clamp(min=0)[:, None])[:, 0], softcap)
    hint_logp_N = logit_at_hint_N - logit_at_target_N - nll_N
    if queries.byte_trees is None:
        return TargetScores(nll_N, hint_logp_N)

    path = queries.byte_trees.path_logits(
        softcapped(z_NV.detach(), softcap), targets_N, hints_N, queries.tree_ids_N
    )
    return TargetScores(nll_N, hint_logp_N, path.hint_logit_N, path.path_logits_DN)
