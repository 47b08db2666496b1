"""The logits of a path's decisions from a network's distribution, for many targets at once, where the distribution is.

A hint is left out of the distribution, because the tilt changes it and what is left would be a difference of nearly equal numbers; what it
has comes as a logit of its own. Sums are of integers, 2^61 to the whole: exact, and so the same in every order. A sum of floats over the
ids before a place would lose rare ids entirely.

Shapes: N targets, V vocabulary, T trees, E decisions of all paths, D decisions of the longest.
"""

import numpy as np
import torch
from torch import Tensor

from stages.scoring.byte_tree import UNIT, Trees

NO_HINT = -1


class Forest:
    """Trees on a device."""

    def __init__(self, trees: Trees, device: torch.device) -> None:
        self.trees, self.longest = trees, trees.longest
        self.order_TV, self.first_TV, self.count_TV, self.edges_3E = (
            torch.from_numpy(array).to(device)
            for array in (
                trees.order_TV,
                trees.first_TV[:, :-1].copy(),
                np.diff(trees.first_TV, axis=1),
                np.stack((trees.low_E, trees.middle_E, trees.high_E)),
            )
        )

    @property
    def rows(self) -> int:
        """The hint's logit, and the decisions of the longest path."""
        return 1 + self.longest

    def read(self, logits_NV: Tensor, targets_N: Tensor, hints_N: Tensor, trees_N: Tensor) -> Tensor:
        """Those rows, (1 + D, N) float32; 0 behind a path's end and for no hint, infinite where one side is the hint alone."""
        units_NV = torch.softmax(logits_NV.double(), dim=1).mul_(UNIT).round_().long().clamp_(min=1)
        place_N1 = hints_N.clamp(min=0)[:, None]
        hint_N = units_NV.gather(1, place_N1)[:, 0] * (hints_N != NO_HINT)
        units_NV.scatter_add_(1, place_N1, -hint_N[:, None])
        sums_NV = units_NV.gather(1, self.order_TV[trees_N]).cumsum_(1)
        hint_logit_N = torch.where(hint_N > 0, hint_N.double().log() - sums_NV[:, -1].double().log(), 0.0)

        steps_D = torch.arange(self.longest, device=logits_NV.device)
        is_there_ND = steps_D < self.count_TV[trees_N, targets_N, None]
        edges_3ND = self.edges_3E[
            :, torch.where(is_there_ND, self.first_TV[trees_N, targets_N, None] + steps_D, 0)
        ]
        before_3ND = torch.stack(
            [sums_NV.gather(1, (edges_ND - 1).clamp(min=0)) * (edges_ND > 0) for edges_ND in edges_3ND]
        )
        left_ND, right_ND = before_3ND.diff(dim=0).double().log()
        path_ND = torch.where(is_there_ND, right_ND - left_ND, 0.0)
        return torch.cat((hint_logit_N[None], path_ND.T)).float()
