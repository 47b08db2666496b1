"""A network's scorer, an n-gram tilt and a byte mixture as one scorer.

Hints and byte trees are functions of the tokens alone, so a stream is scored in a straight line: look
up the hints of all targets, run the network once with queries for both, tilt its scores, mix in the
byte model. Only `predict` needs the three distributions one after the other.

Observed single tokens are collected until something depends on them: scored as a batch they cost a
fraction.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from stages.common.copy_on_write import CopyOnWrite
from stages.scoring.byte_tree import tree_index_after
from stages.scoring.byte_tree_logits import DeviceByteTrees
from stages.scoring.queries import NetworkScorer, Queries
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.ngram.tilt import NgramTilt, no_hints

PIECE = 1 << 20  # targets per piece of a stream: one is mixed while the next is scored


class EnsembleScorer:
    """A lawful scorer of three parts; tilt and mixer are optional.

    Their state is shared by forks until one of them observes a token. `device` is the network's,
    `boundary_V` tells the ids after which a token is in the second byte tree (bpb.ByteTable).
    """

    def __init__(
        self,
        network: NetworkScorer,
        boundary_V: np.ndarray,
        device: torch.device,
        tilt: NgramTilt | None = None,
        mixer: ByteMixer | None = None,
    ) -> None:
        self.network = network
        self.boundary_V = boundary_V
        self.tilt = CopyOnWrite(tilt, NgramTilt.copy) if tilt else None
        self.mixer = CopyOnWrite(mixer, ByteMixer.copy) if mixer else None
        self.byte_trees = DeviceByteTrees(mixer.trees, device) if mixer else None
        self.last_token: int | None = None  # the last one that was scored or given
        self.pending_tokens: list[int] = []  # observed, not scored yet

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.network.vocab_size

    @property
    def warm_up_targets(self) -> int:
        """That of the network's scorer."""
        return self.network.warm_up_targets

    def fork(self) -> "EnsembleScorer":
        """An independent copy."""
        self._score_pending()
        twin = copy.copy(self)
        twin.network = self.network.fork()
        twin.tilt = self.tilt and self.tilt.fork()
        twin.mixer = self.mixer and self.mixer.fork()
        twin.pending_tokens = []
        return twin

    def observe(self, token: int) -> None:
        """Append a token to the prefix."""
        self.pending_tokens.append(token)

    def predict(self) -> np.ndarray:
        """Natural log-probabilities of the next token, (V,) float64."""
        self._score_pending()
        logp_V = self.network.predict()
        if self.tilt:
            logp_V = self.tilt.value.distribution(logp_V)
        if self.mixer:
            tree = int(tree_index_after(self.boundary_V, np.array([self.last_token]))[0])
            logp_V = self.mixer.value.distribution(logp_V, tree)
        return logp_V

    def score_stream(self, tokens: np.ndarray) -> np.ndarray:
        """Score and observe tokens (N,) in order; nats, float32."""
        self._score_pending()
        tilt = self.tilt.writable() if self.tilt else None
        mixer = self.mixer.writable() if self.mixer else None
        trees = mixer.trees if mixer else None

        piece_size = PIECE if mixer else max(1, len(tokens))
        unmixed: list[np.ndarray] = []
        mixed: list[Future[np.ndarray]] = []
        with ThreadPoolExecutor(1) as mixing_thread:
            for first in range(0, len(tokens), piece_size):
                piece = tokens[first : first + piece_size]

                # Targets and their predecessors. The first token of a stream is given, not scored.
                before = np.array([] if self.last_token is None else [self.last_token], np.int64)
                known = np.concatenate((before, piece.astype(np.int64)))
                previous_N = known[:-1]
                targets_N = known[1:]
                self.last_token = int(piece[-1])

                # Look up what depends on tokens alone.
                trees_N = tree_index_after(self.boundary_V, previous_N)
                hints = tilt.observe(piece).last(len(targets_N)) if tilt else no_hints(len(targets_N))

                # Score with the network, then tilt.
                scores = self.network.score(piece, Queries(hints.ids_N, trees_N, self.byte_trees))
                if tilt:
                    tilt.score_and_learn_(scores, hints, targets_N, trees_N, trees)

                # The mixing thread works on this piece while the network scores the next one.
                if mixer is None:
                    unmixed.append(scores.nll_N)
                    continue
                assert scores.path_logits_DN is not None, "byte trees were queried"
                logits_ND = np.ascontiguousarray(scores.path_logits_DN.T)
                mixed.append(
                    mixing_thread.submit(mixer.score_and_learn, targets_N, trees_N, logits_ND, scores.nll_N)
                )

        nll_of_pieces = [*unmixed, *(nll_N.result() for nll_N in mixed)]
        return np.concatenate([np.empty(0, np.float32), *nll_of_pieces])

    def _score_pending(self) -> None:
        if self.pending_tokens:
            tokens = np.array(self.pending_tokens, dtype=np.uint16)
            self.pending_tokens = []
            self.score_stream(tokens)
