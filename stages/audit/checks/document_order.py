"""C1 and C4: which document of a call depends on which (B1c)?

A few short documents are scored in one call, and again with one token of each exchanged in turn. If a
loss of document i then changes, i depends on the document j whose token was exchanged. In a lawful
stream no document depends on a later one. If one does, the dependencies may still agree with some other
order (longest first, the queue of #1530), in which a decoder could work but which is not the official
one; a cycle agrees with no order, and nothing could decode it (the lineage of #2130: training in one
order, a cache in another).

A BOS is predicted at the end of the document before it, so it counts as the last target of that one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.probe_runner import Cost
from stages.audit.sampling import KeyedRng
from stages.audit.verdict import Check, Verdict
from stages.common.scorer import Scorer

DEPENDENCY_GRAPH = Check(
    "B1c",
    "dependency graph",
    conditions=("C1", "C4"),
    sees="documents scored in another order than the stream's with shared state, circles, "
    "state that crosses a declared boundary",
    blind="documents further apart than those of one call; dependencies too small to tell from rounding",
)
SHORTEST_DOCUMENT = 6  # tokens, BOS included
LONGEST_DOCUMENT = 40  # drawn lengths are below; document i of a call is then made i tokens longer


class Dependency(NamedTuple):
    """A loss of document `target` that changed when a token of document `source` was exchanged."""

    source: int
    target: int
    position: int  # in the call, of the first target of that document whose loss changed
    exchanged: int  # in the call, of the exchanged token
    before: float  # the loss in nats, before and after the exchange
    after: float


@dataclass(frozen=True)
class OrderProbe:
    """Probe: score documents in one call after tokens[:start], and exchange a token of each in turn."""

    start: int
    documents: tuple[np.ndarray, ...]  # token ids, each begins with BOS
    positions: tuple[int, ...]  # of each document's exchanged token, in the call
    substitutes: tuple[int, ...]  # the id that takes its place
    rounding: float  # nats by which equal losses may differ

    @property
    def cost(self) -> Cost:
        """Work that `run` asks for."""
        return self.cost_of(len(self.documents), sum(map(len, self.documents)))

    @staticmethod
    def cost_of(documents: int, tokens: int) -> Cost:
        """Cost of scoring `tokens` in all as they are, and once with a token of each document exchanged."""
        return Cost(calls=1, targets=tokens) * (1 + documents)

    def run(self, scorer: Scorer, tokens: np.ndarray) -> list[Dependency]:
        """Find dependencies between different documents, and of a document on its own later tokens."""
        call = np.concatenate(self.documents)

        # The document of each target; a BOS belongs to the document before it.
        lengths = [len(document) for document in self.documents]
        owner = np.repeat(np.arange(len(lengths)), lengths)
        owner[np.cumsum([0, *lengths[:-1]])] -= 1

        base = probe_runner.checked_score(scorer.fork(), call)
        dependencies = []
        for source, (position, substitute) in enumerate(zip(self.positions, self.substitutes, strict=True)):
            exchanged = call.copy()
            exchanged[position] = substitute
            nll = probe_runner.checked_score(scorer.fork(), exchanged)

            # Within the source document only the targets before the exchanged token must not change.
            changed = np.flatnonzero(probe_runner.differs(nll, base, self.rounding))
            changed = changed[(owner[changed] != source) | (changed < position)]
            for target in np.unique(owner[changed]).tolist():
                first = int(changed[owner[changed] == target][0])
                dependencies.append(
                    Dependency(source, target, first, position, float(base[first]), float(nll[first]))
                )
        return dependencies


def probe(
    key: bytes,
    start: int,
    tokens: np.ndarray,
    vocab_size: int,
    bos: int,
    documents: int,
    rounding: float,
) -> OrderProbe:
    """Cut documents of different lengths from anywhere in the stream (N,), and choose their exchanged tokens.

    The longest is neither the first nor the last.
    """
    rng = KeyedRng(key, "graph")
    longest = min(LONGEST_DOCUMENT, len(tokens) - 1)
    shortest = min(SHORTEST_DOCUMENT, longest)
    lengths = rng.below(max(1, longest - SHORTEST_DOCUMENT), documents) + shortest + np.arange(documents)
    lengths = np.roll(np.sort(lengths), 1 + documents // 2)
    lengths = np.minimum(lengths, len(tokens))

    call_position = 0  # of the document's BOS
    cut: list[np.ndarray] = []
    positions: list[int] = []
    substitutes: list[int] = []
    for length in lengths.tolist():
        begin = rng.integer(0, len(tokens) - length + 1)
        piece = tokens[begin : begin + length]
        document = np.where(piece == bos, (bos + 1) % vocab_size, piece).astype(tokens.dtype)
        document[0] = bos

        # Exchange the last token, the first, or any one, in turn: leaks are commonest where documents meet.
        offset = (length - 1, 1, rng.integer(1, length))[len(cut) % 3]
        substitute = (int(document[offset]) + rng.integer(1, vocab_size)) % vocab_size
        if substitute == bos:
            substitute = (substitute + 1) % vocab_size
        cut.append(document)
        positions.append(call_position + offset)
        substitutes.append(substitute)
        call_position += length
    return OrderProbe(start, tuple(cut), tuple(positions), tuple(substitutes), rounding)


def max_tokens(documents: int) -> int:
    """Upper bound of the tokens of a call, all documents together, as `probe` cuts them."""
    return documents * (LONGEST_DOCUMENT - 1) + documents * (documents - 1) // 2


def judge(subject: str, probe: OrderProbe, dependencies: list[Dependency], scope: str) -> Verdict:
    """B1c: no document depends on a later one.

    If the scorer declares the scope "document", none may depend on any other.
    """
    # A dependency on a later token is a failure in any case; one on another document only by declaration.
    count = len(probe.documents)
    failed = [dependency for dependency in dependencies if dependency.position < dependency.exchanged]
    if failed:
        order = (
            "the dependencies form a circle, so that no order could be decoded"
            if _is_circular(dependencies)
            else "another order was used"
        )
        evidence = f"{len(failed)} dependencies on later tokens, the first {_describe(failed[0])}; {order}"
    elif scope == "document" and dependencies:
        # All of them are on earlier tokens, which is lawful, but not as declared.
        failed = dependencies
        evidence = (
            f"declared to score each document by itself, but {len(failed)} dependencies between documents, "
            f"the first {_describe(failed[0])}"
        )
    elif scope == "document":
        evidence = f"{count} documents in one call, declared independent: none depends on another"
    else:
        evidence = (
            f"{count} documents in one call: {len(dependencies)} dependencies on an earlier one, "
            "none on a later one"
        )

    return Verdict.of(
        DEPENDENCY_GRAPH,
        subject,
        not failed,
        evidence,
        # The first loss that must not depend on the exchanged token.
        saw=failed[0].after if failed else 0,
        expected=failed[0].before if failed else 0,
        bound=probe.rounding,
        positions=tuple(probe.start + dependency.position for dependency in failed[:3]),
    )


def _describe(dependency: Dependency) -> str:
    return (
        f"of document {dependency.target} on {dependency.source} "
        f"(a loss moved from {dependency.before:.6g} to {dependency.after:.6g} nats)"
    )


def _is_circular(dependencies: list[Dependency]) -> bool:
    """Test whether no order of the documents puts every source before its target (Kahn's algorithm)."""
    remaining = {(dependency.source, dependency.target) for dependency in dependencies}
    while remaining:
        sources = {source for source, _ in remaining}
        targets = {target for _, target in remaining}
        if not sources - targets:
            return True
        # Documents that depend on nothing that remains come first; remove them.
        remaining = {(source, target) for source, target in remaining if source in targets}
    return False
