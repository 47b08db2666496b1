"""A byte model mixed in on any scorer's decisions: a lawful scorer that wraps another (#1916 without what was wrong with it).

The wrapped scorer says what it makes of each decision on a token's path through the tree of bytes (scoring/byte_tree.py); statistics of the
bytes before (mixer.py) are mixed with it, and what all decisions have gained is taken from the loss:

    loss = -log p(v) + sum over the path of log n - log m

where n and m are the network's and the mixed probability of the side taken. As long as nothing has been learnt m is n, and the loss is the
wrapped scorer's to the last bit. All that m depends on is the prefix and the token's own bytes so far.

Shapes: N targets, V vocabulary, R rows of an answer.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch

from stages.common.bpb import ByteTable
from stages.common.copy_on_write import Shared
from stages.scoring import byte_tree
from stages.scoring.byte_tree_logits import NO_HINT, Forest
from stages.scoring.evaluate import AskedScorer
from stages.scoring.queries import Asked
from stages.ttt_eval.bytemix.mixer import Mixture
from stages.ttt_eval.wrapper import Wrapper

BYTES_A_TARGET = 4  # about, to size tables by
PIECE = 1 << 20  # targets whose answers are held at a time, while the ones before are mixed


class MixerScorer(Wrapper):
    """A lawful scorer; the stream's length, a public constant, sizes its tables. `table` is what the ids say."""

    def __init__(
        self, scorer: AskedScorer, rate: float, table: ByteTable, n_targets: int, device: torch.device
    ) -> None:
        super().__init__(scorer)
        self.rate = rate
        self.forest = Forest(byte_tree.of_table(table), device)
        self.mixture = Shared(Mixture(self.forest.trees, n_targets * BYTES_A_TARGET), Mixture.copy)
        self.last: int | None = None  # token that was scored

    def fork(self) -> Self:
        """An independent copy; the tables are shared until one of the two goes on."""
        twin = super().fork()
        twin.mixture = self.mixture.fork()
        return twin

    def _bend(self, logp_V: np.ndarray) -> np.ndarray:
        trees = self.forest.trees
        number = int(byte_tree.numbers_behind(trees.boundary_V, np.array([self.last]))[0])
        return self.mixture.value.law(number, byte_tree.sums(logp_V, trees.order_TV[number]))

    def _score(self, tokens: np.ndarray, asked: Asked | None) -> np.ndarray:
        """Pieces are mixed by a thread of their own, while the wrapped scorer goes on."""
        assert asked is None, "nothing lies on top of this scorer"
        mixture, trees = self.mixture.own(), self.forest.trees
        with ThreadPoolExecutor(1) as thread:
            at_work = []
            for first in range(0, len(tokens), PIECE):
                piece = tokens[first : first + PIECE]
                previous = np.concatenate(([] if self.last is None else [self.last], piece)).astype(np.int64)[
                    :-1
                ]
                self.last = int(piece[-1])
                targets, trees_N = (
                    piece[len(piece) - len(previous) :].astype(np.int64),
                    byte_tree.numbers_behind(trees.boundary_V, previous),
                )
                answers = self.scorer.score(
                    piece, Asked(np.stack((np.full_like(trees_N, NO_HINT), trees_N)), self.forest)
                )
                paths_ND = np.ascontiguousarray(answers[3:].T)
                at_work.append(
                    thread.submit(mixture.follow, targets, trees_N, paths_ND, answers[0], self.rate)
                )
            return np.concatenate([np.empty(0, dtype=np.float32), *(work.result() for work in at_work)])[None]
