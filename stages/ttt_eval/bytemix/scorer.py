"""A byte model mixed in on top of any scorer: #1916 without what was wrong with it.

The wrapped scorer gives its logit of each decision on a token's path through the byte tree
(scoring/byte_tree.py). A model of the bytes so far (mixer.py) is mixed with it, and the gain of all
decisions is taken from the loss:

    loss = -log p(v) + sum over the path of (log n - log m)

where n and m are the network's and the mixed probability of the side taken. Until something is
learned, m is n, and the loss is the wrapped scorer's to the last bit. m depends on nothing but the
prefix and the token's own bytes so far.

Shapes: N targets, V vocabulary, R rows of a result.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch

from stages.common.bpb import ByteTable
from stages.common.copy_on_write import CopyOnWrite
from stages.scoring import byte_tree
from stages.scoring.byte_tree_logits import NO_HINT, DeviceByteTrees
from stages.scoring.evaluate import QueryableScorer
from stages.scoring.queries import Queries
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.wrapper import Wrapper

BYTES_PER_TARGET = 4  # roughly; sizes the tables
PIECE = 1 << 20  # targets per piece of a stream: one is mixed while the next is scored


class MixerScorer(Wrapper):
    """A lawful scorer that wraps another.

    The stream's length, a public constant, sizes its tables. `table` has the text of the ids.
    """

    def __init__(
        self, scorer: QueryableScorer, rate: float, table: ByteTable, n_targets: int, device: torch.device
    ) -> None:
        super().__init__(scorer)
        self.rate = rate
        self.byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(table), device)
        mixer = ByteMixer(self.byte_trees.trees, n_targets * BYTES_PER_TARGET)
        self.mixer = CopyOnWrite(mixer, ByteMixer.copy)
        self.last_token: int | None = None  # the last one observed

    def fork(self) -> Self:
        """An independent copy; the tables are shared until one of the two observes a token."""
        twin = super().fork()
        twin.mixer = self.mixer.fork()
        return twin

    def _adjust_distribution(self, logp_V: np.ndarray) -> np.ndarray:
        trees = self.byte_trees.trees
        tree = int(byte_tree.tree_index_after(trees.boundary_V, np.array([self.last_token]))[0])
        mass_V1 = byte_tree.cumulative_mass(logp_V, trees.sorted_ids_TV[tree])
        return self.mixer.value.distribution(tree, mass_V1)

    def _score(self, tokens: np.ndarray, queries: Queries | None) -> np.ndarray:
        """Score and mix piece by piece: a thread mixes one while the wrapped scorer scores the next."""
        assert queries is None, "no scorer on top of this one can ask it for more than losses"
        mixer = self.mixer.writable()
        pieces: list[Future[np.ndarray]] = []
        with ThreadPoolExecutor(1) as thread:
            for first in range(0, len(tokens), PIECE):
                piece = tokens[first : first + PIECE].astype(np.int64)

                # A target and its predecessor; the first token of a stream is given, not scored.
                if self.last_token is None:
                    targets_N = piece[1:]
                    previous_N = piece[:-1]
                else:
                    targets_N = piece
                    previous_N = np.concatenate(([self.last_token], piece[:-1]))
                self.last_token = int(piece[-1])

                # The wrapped scorer's losses and path logits.
                trees_N = byte_tree.tree_index_after(self.byte_trees.trees.boundary_V, previous_N)
                no_hints_N = np.full_like(trees_N, NO_HINT)
                scores = self.scorer.score(
                    tokens[first : first + PIECE], Queries(no_hints_N, trees_N, self.byte_trees)
                )
                nll_N = scores[0]
                logits_ND = np.ascontiguousarray(scores[3:].T)
                pieces.append(
                    thread.submit(mixer.score_and_learn, targets_N, trees_N, logits_ND, nll_N, self.rate)
                )
        nll_of_pieces = [piece_nll.result() for piece_nll in pieces]
        return np.concatenate([np.empty(0, dtype=np.float32), *nll_of_pieces])[None]
