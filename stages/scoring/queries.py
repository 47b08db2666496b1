"""What a scorer's distributions are asked for beside the losses of their targets, by what is built on top of it.

An answer is a column of a matrix, one for each target, computed in the same pass as its loss and from the same logits:

    row 0            the loss, nats
    row 1            log-probability of the hint
    row 2            its logit, from exact sums
    rows 3 and on    the logits of the decisions on the target's path through the tree of bytes, in a law without the hint

Row 1 is there when something is asked, rows 2 and on when paths are. All that is asked is known before the target is.

Shapes: N targets, V vocabulary, R rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.scoring.byte_tree_logits import Forest
from stages.train.model import Model
from stages.train.reference import softcapped


class Asked(NamedTuple):
    """The questions about N targets."""

    about_2N: (
        np.ndarray
    )  # int64: an id whose probability is asked for, or NO_HINT; the number of the tree that the target is in
    forest: Forest | None = None  # without it no path is asked for

    def part(self, first: int, end: int) -> "Asked":
        """The questions about targets first ... end - 1."""
        return self._replace(about_2N=self.about_2N[:, first:end])


def rows_of(asked: Asked | None) -> int:
    """The rows of an answer."""
    if asked is None:
        return 1
    return 2 if asked.forest is None else 2 + asked.forest.rows


class Questions(NamedTuple):
    """What is asked about the targets of one pass, where it is computed."""

    about_2N: Tensor
    forest: Forest | None


def scores_of(model: Model, z_NV: Tensor, targets_N: Tensor, questions: Questions | None) -> Tensor:
    """The answers that logits before the softcap give, (R, N) float32; only the first row has a gradient worth having."""
    softcap = model.params.logit_softcap
    nll_N = model.operations.cross_entropy(z_NV, targets_N, softcap)
    if questions is None:
        return nll_N[None]
    hints_N, trees_N = questions.about_2N
    at_target, at_hint = (
        softcapped(z_NV.gather(1, ids[:, None])[:, 0], softcap) for ids in (targets_N, hints_N.clamp(min=0))
    )
    hinted = torch.stack((nll_N, at_hint - at_target - nll_N))
    if questions.forest is None:
        return hinted
    return torch.cat(
        (hinted, questions.forest.read(softcapped(z_NV.detach(), softcap), targets_N, hints_N, trees_N))
    )
