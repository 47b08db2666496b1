"""Extra outputs per target that a scorer built on top of another one requests.

They are a hint's probability and byte-path logits, computed in the same pass and from the same
logits as the loss. The result is a matrix with one column for each target:

    row 0            loss, nats
    row 1            log-probability of the hinted token
    row 2            logit of the hinted token against all others, from exact sums
    rows 3 and on    logits of the decisions on the target's path through the byte tree,
                     in the distribution without the hint

Row 1 is there when there are queries, rows 2 and on when they have byte trees. A query depends only
on tokens before its target.

Shapes: N targets, V vocabulary, R rows of the result.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.scoring.byte_tree_logits import DeviceByteTrees
from stages.train.model import Model
from stages.train.reference import softcapped


class DeviceQueries(NamedTuple):
    """The queries of one forward pass, on the device of its logits."""

    hint_ids: Tensor  # int64
    tree_ids: Tensor  # int64, of the same shape
    byte_trees: DeviceByteTrees | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "DeviceQueries":
        """Apply `function`, which selects or reshapes, to both tensors of ids."""
        return self._replace(hint_ids=function(self.hint_ids), tree_ids=function(self.tree_ids))


class Queries(NamedTuple):
    """Requests for each of N targets."""

    hint_ids_N: np.ndarray  # int64: the token whose probability is wanted, or NO_HINT
    tree_ids_N: np.ndarray  # int64: the number of the target's byte tree (byte_tree.tree_index_after)
    byte_trees: DeviceByteTrees | None = None  # None: no path logits are wanted

    def part(self, first: int, end: int) -> "Queries":
        """The queries of targets first ... end - 1."""
        return self._replace(hint_ids_N=self.hint_ids_N[first:end], tree_ids_N=self.tree_ids_N[first:end])

    def to_device(self, arrange: Callable[[np.ndarray], Tensor]) -> DeviceQueries:
        """Move the queries to the device of a pass.

        `arrange` takes ids (N,) and returns a tensor in the order in which the pass computes its
        targets.
        """
        return DeviceQueries(arrange(self.hint_ids_N), arrange(self.tree_ids_N), self.byte_trees)


def result_rows(queries: Queries | None) -> int:
    """R, the number of rows of the result."""
    if queries is None:
        return 1
    if queries.byte_trees is None:
        return 2
    return 2 + queries.byte_trees.output_rows


def score_targets(
    model: Model, z_NV: Tensor, targets_N: Tensor, device_queries: DeviceQueries | None
) -> Tensor:
    """Compute the result, (R, N) float32, from logits before the softcap.

    Only the first row, the loss, has a useful gradient.
    """
    softcap = model.params.logit_softcap
    nll_N = model.ops.cross_entropy(z_NV, targets_N, softcap)
    if device_queries is None:
        return nll_N[None]

    # log p(hint) = log p(target) + (logit of the hint - logit of the target)
    hints_N, trees_N, byte_trees = device_queries
    logit_at_target_N = softcapped(z_NV.gather(1, targets_N[:, None])[:, 0], softcap)
    logit_at_hint_N = softcapped(z_NV.gather(1, hints_N.clamp(min=0)[:, None])[:, 0], softcap)
    hinted_2N = torch.stack((nll_N, logit_at_hint_N - logit_at_target_N - nll_N))
    if byte_trees is None:
        return hinted_2N

    path_logits = byte_trees.path_logits(softcapped(z_NV.detach(), softcap), targets_N, hints_N, trees_N)
    return torch.cat((hinted_2N, path_logits))
