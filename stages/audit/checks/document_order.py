"""C1 and C4: which document moves which (B1c)?

A few short documents are scored in one call, and again with one token of each exchanged in turn. "Document j moves document i" where a
loss of i is another number then. In a lawful stream an arrow never points backwards. Where one does, the arrows may still agree with some
other order (longest first, #1530's queue), in which a decoder could work but which is not the official one; a circle agrees with none, and
nothing could decode it (#2130's lineage: training in one order, a cache in another).

A BOS is predicted at the end of the document before it, so it counts as that one's last target.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

SHORTEST, LONGEST = 6, 40  # tokens of a document, BOS included


class Arrow(NamedTuple):
    """An exchanged token of document `source` moved a loss of document `target`, of the target at `position` in the call."""

    source: int
    target: int
    position: int
    exchanged: int  # the position that was exchanged
    before: float
    after: float


@dataclass(frozen=True)
class Graph:
    """A probe: documents to score in one call behind the walker, and what to put where in each of them."""

    start: int
    documents: tuple[np.ndarray, ...]
    places: tuple[int, ...]  # of the exchanged token, counted from the call's first
    substitutes: tuple[int, ...]

    def run(self, scorer: Scorer, tokens: np.ndarray) -> list[Arrow]:
        """The arrows between different documents, and those within one that point backwards."""
        call = np.concatenate(self.documents)
        owner = np.repeat(np.arange(len(self.documents)), [len(document) for document in self.documents])
        owner[np.cumsum([0, *(len(document) for document in self.documents[:-1])])] -= 1
        base = probe_runner.score(scorer.fork(), call)
        arrows = []
        for source, (place, substitute) in enumerate(zip(self.places, self.substitutes, strict=True)):
            exchanged = call.copy()
            exchanged[place] = substitute
            nll = probe_runner.score(scorer.fork(), exchanged)
            moved = np.flatnonzero(probe_runner.moved(nll, base))
            moved = moved[(owner[moved] != source) | (moved < place)]
            for target in np.unique(owner[moved]).tolist():
                first = int(moved[owner[moved] == target][0])
                arrows.append(Arrow(source, target, first, place, float(base[first]), float(nll[first])))
        return arrows


def probe(key: bytes, start: int, tokens: np.ndarray, vocab_size: int, bos: int, documents: int) -> Graph:
    """Documents of different lengths, cut from anywhere in the stream, the longest neither first nor last."""
    draw = Draw(key, "graph")
    longest = min(LONGEST, len(tokens) - 1)
    lengths = np.sort(
        draw.below(max(1, longest - SHORTEST), documents) + min(SHORTEST, longest) + np.arange(documents)
    )
    lengths = np.roll(lengths, 1 + documents // 2)
    at = 0
    made: list[np.ndarray] = []
    places: list[int] = []
    substitutes: list[int] = []
    for length in np.minimum(lengths, len(tokens)).tolist():
        begin = draw.one(0, len(tokens) - length + 1)
        document = np.where(
            tokens[begin : begin + length] == bos, (bos + 1) % vocab_size, tokens[begin : begin + length]
        )
        document[0] = bos
        place = (length - 1, 1, draw.one(1, length))[
            len(made) % 3
        ]  # leaks are commonest where documents meet
        substitute = (int(document[place]) + draw.one(1, vocab_size)) % vocab_size
        made.append(document.astype(tokens.dtype))
        places.append(at + place)
        substitutes.append(substitute if substitute != bos else (substitute + 1) % vocab_size)
        at += length
    return Graph(start, tuple(made), tuple(places), tuple(substitutes))


def judge(subject: str, graph: Graph, arrows: list[Arrow], scope: str) -> Verdict:
    """B1c: no arrow points backwards; and none leads to another document where the scorer declares that each stands alone."""
    guilty = [arrow for arrow in arrows if arrow.position < arrow.exchanged]
    evidence = (
        f"{len(graph.documents)} documents in one call: {len(arrows)} move a later one, none an earlier one"
    )
    if guilty:
        order = (
            "the arrows form a circle, so that no order could be decoded"
            if _is_circular(arrows)
            else "another order was used"
        )
        evidence = f"{len(guilty)} arrows point backwards, the first {_text(guilty[0])}; {order}"
    elif scope == "document" and arrows:
        guilty = arrows
        evidence = f"declared to score each document by itself, but {len(guilty)} move others, the first {_text(guilty[0])}"
    elif scope == "document":
        evidence = (
            f"{len(graph.documents)} documents in one call, declared to stand alone: none moves another"
        )
    worst = guilty[0] if guilty else None
    return Verdict(
        check="B1c",
        name="dependency graph",
        subject=subject,
        conditions=("C1", "C4"),
        outcome=outcome(not guilty),
        evidence=evidence,
        saw=worst.after if worst else 0,
        expected=worst.before if worst else 0,
        bound=probe_runner.ROUNDING,
        positions=tuple(graph.start + arrow.position for arrow in guilty[:3]),
        sees="documents scored in another order than the stream's with state in common, circles, what crosses a declared boundary",
        blind="documents further apart than those of one call; dependences too small to tell from rounding",
    )


def _text(arrow: Arrow) -> str:
    return (
        f"{arrow.source} to {arrow.target} (a loss moved from {arrow.before:.6g} to {arrow.after:.6g} nats)"
    )


def _is_circular(arrows: list[Arrow]) -> bool:
    """Whether no order of the documents puts every arrow's source before its target."""
    left = {(arrow.source, arrow.target) for arrow in arrows}
    while left:
        sources, targets = ({arrow[end] for arrow in left} for end in (0, 1))
        if not sources - targets:
            return True
        left = {arrow for arrow in left if arrow[0] in targets}
    return False
