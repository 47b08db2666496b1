"""C2, by what a scorer must not care about (B10).

Three changes that a lawful scorer shrugs off, for those who can make them of themselves. *Other names*: with the ids permuted, in the
scorer and in the stream, the losses stay. *No memory*: with its memory's weight at zero, how the memory is hashed is nobody's business.
*One bucket*: when every context falls into one, a memory knows nothing, and what it still gains is mass that was counted twice (#770, #779
and 33 more: one bucket gave 0 bits a byte); on ids drawn at random that gain is bounded as in canary.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stages.audit import probe_runner
from stages.audit.checks import canary
from stages.audit.sampling import Draw
from stages.audit.verdict import Verdict, outcome
from stages.common.scorer import Scorer

BUCKETS = (1, 1 << 10, 1 << 16)


class Variants(NamedTuple):
    """Other versions of one scorer, each at the empty prefix; None where it cannot be made."""

    relabelled: Callable[[np.ndarray], Scorer] | None = None  # id a is called permutation[a]
    hashed: Callable[[int], Scorer] | None = None  # by the number of buckets
    forgetful: Callable[[int], Scorer] | None = None  # memory's weight 0, by the number of buckets


NONE = Variants()


def check(
    subject: str,
    variants: Variants,
    key: bytes,
    tokens: np.ndarray,
    base: np.ndarray,
    vocab_size: int,
    tolerances: tuple[float, float],
) -> list[Verdict]:
    """One verdict for each variant that there is.

    `base` is what the plain scorer charges for tokens[1:] from the stream's start; tolerances: nats for one loss, bits won on noise.
    """
    verdicts = []
    if variants.relabelled is not None:
        names = Draw(key, "names").order(vocab_size)
        verdicts.append(
            _same(
                subject,
                "other names for the ids",
                base,
                _scored(variants.relabelled(names), names[tokens]),
                tolerances[0],
            )
        )
    if variants.forgetful is not None:
        first, *others = (_scored(variants.forgetful(buckets), tokens) for buckets in BUCKETS)
        far = max(others, key=lambda other: float(np.abs(other - first).max()))
        verdicts.append(_same(subject, "a memory of no weight", first, far, 0.0))
    if variants.hashed is not None:
        known = canary.draw("uniform", key, len(tokens), tokens, vocab_size)
        scorer = variants.hashed(1)
        scorer.observe(int(tokens[0]))
        seen = canary.Won(
            "uniform, one bucket", 1, canary.won(known.logp, probe_runner.score(scorer, known.tokens))
        )
        verdicts.append(canary.judge(subject, "B10", "one bucket", [seen], tolerances[1]))
    return verdicts


def _scored(scorer: Scorer, tokens: np.ndarray) -> np.ndarray:
    scorer.observe(int(tokens[0]))
    return probe_runner.score(scorer, tokens[1:].astype(np.uint16))


def _same(subject: str, name: str, base: np.ndarray, varied: np.ndarray, tolerance: float) -> Verdict:
    apart = np.nan_to_num(np.abs(base.astype(np.float64) - varied), nan=np.inf)
    worst = int(apart.argmax())
    return Verdict(
        check="B10",
        name=name,
        subject=subject,
        conditions=("C2",),
        outcome=outcome(bool(apart[worst] <= tolerance)),
        evidence=f"{len(base)} targets from the stream's start, as they are and with {name}: largest difference {apart[worst]:.1e} nats",
        saw=float(varied[worst]),
        expected=float(base[worst]),
        bound=tolerance,
        positions=(worst + 1,),
        sees="ids whose number matters, collisions of hashes that gain, a memory that acts when it is off",
        blind="cheats that treat all ids and buckets alike (B3)",
    )
