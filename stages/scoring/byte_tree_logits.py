"""Logits of the decisions on the targets' paths through the byte tree, from logits over tokens.

Computed for many targets at once, on the device of the logits. A hint (stages/ttt_eval/ngram) is
left out of the distribution: the tilt changes its probability, and the rest would be a difference
of nearly equal numbers. The hint's own logit against all other tokens is computed separately.

Sums are of integers, of which UNIT = 2^61 make probability 1. They are exact, and so the same in
every order. A cumulative sum of floats would lose rare ids entirely.

Shapes: N targets, V vocabulary, T trees, E decisions of all paths, D decisions of the longest path.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.scoring.byte_tree import UNIT, ByteTrees

NO_HINT = -1  # in the place of a token id


class PathLogits(NamedTuple):
    """Logits of the decisions about N targets, float32."""

    hint_logit_N: Tensor  # of the hint against all other tokens; 0 where there is no hint
    path_logits_DN: Tensor  # of the right sides on the target's path; 0 after its end


class DeviceByteTrees:
    """The byte trees' paths on a device."""

    def __init__(self, trees: ByteTrees, device: torch.device) -> None:
        self.trees = trees
        self.longest_path = trees.longest_path
        path_start_TV = trees.path_start_TV[:, :-1].copy()
        path_length_TV = np.diff(trees.path_start_TV, axis=1)
        edges_3E = np.stack((trees.low_E, trees.middle_E, trees.high_E))
        self.sorted_ids_TV = torch.from_numpy(trees.sorted_ids_TV).to(device)
        self.path_start_TV = torch.from_numpy(path_start_TV).to(device)
        self.path_length_TV = torch.from_numpy(path_length_TV).to(device)
        self.edges_3E = torch.from_numpy(edges_3E).to(device)

    def path_logits(
        self, logits_NV: Tensor, targets_N: Tensor, hints_N: Tensor, trees_N: Tensor
    ) -> PathLogits:
        """Compute the hints' logits and the logits of the paths' decisions.

        `hints_N` are token ids or NO_HINT, `trees_N` indices of trees. The logit of a decision of
        which one side holds nothing but the hint is infinite.
        """
        # Integer probabilities, at least one unit for each id; the hint's are taken out.
        units_NV = torch.softmax(logits_NV.double(), dim=1).mul_(UNIT).round_().long().clamp_(min=1)
        hint_index_N1 = hints_N.clamp(min=0)[:, None]
        hint_N = units_NV.gather(1, hint_index_N1)[:, 0] * (hints_N != NO_HINT)
        units_NV.scatter_add_(1, hint_index_N1, -hint_N[:, None])

        # Cumulative mass in the order of the ids' bytes.
        sums_NV = units_NV.gather(1, self.sorted_ids_TV[trees_N]).cumsum_(1)
        hint_logit_N = torch.where(hint_N > 0, hint_N.double().log() - sums_NV[:, -1].double().log(), 0.0)

        # The decisions of each target's path; those after its end are masked.
        steps_D = torch.arange(self.longest_path, device=logits_NV.device)
        is_there_ND = steps_D < self.path_length_TV[trees_N, targets_N, None]
        decisions_ND = self.path_start_TV[trees_N, targets_N, None] + steps_D
        edges_3ND = self.edges_3E[:, torch.where(is_there_ND, decisions_ND, 0)]

        # Mass before low, middle and high; its differences are the masses of the two sides.
        before_3ND = torch.stack(
            [sums_NV.gather(1, (edges_ND - 1).clamp(min=0)) * (edges_ND > 0) for edges_ND in edges_3ND]
        )
        left_ND, right_ND = before_3ND.diff(dim=0).double().log()
        path_ND = torch.where(is_there_ND, right_ND - left_ND, 0.0)
        return PathLogits(hint_logit_N.float(), path_ND.T.float())
