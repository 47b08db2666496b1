"""List of all known cheats: where each was seen, and the check of the audit that must detect it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from stages.audit.audit_scorer import ScorerFactory
from stages.audit.checks.metamorphic import Variants
from stages.audit.verdict import Verdict
from tests.zoo import acausal, bookkeeping, harness, lawful, unnormalised

# Audits a cheat, with a temporary folder and the key of all draws.
Trial = Callable[[Path, bytes], list[Verdict]]


class Cheat(NamedTuple):
    """One known cheat."""

    name: str
    seen_in: str  # pull requests of the challenge; "-" if it was never submitted
    detected_by: str  # number and name of the check that must fail; others may fail too
    run: Trial


def scorer(factory: ScorerFactory, variants: Variants | None = None) -> Trial:
    """Build the trial of a scorer."""
    return lambda folder, key: harness.audit(factory, folder, key=key, variants=variants or Variants())


def edited_ledger(folder: Path, key: bytes) -> list[Verdict]:
    """Audit a lawful scorer whose ledger was made smaller."""
    return harness.audit(lawful.Bigram, folder, edit=lambda nll: nll * harness.SHAVED, key=key)


FUTURE = "B1 future perturbation"
LEDGER = "B1 ledger without the future"
ORDER = "B1c dependency graph"
SHOWN_SUM = "B3 committed distribution sums to one"
SCORED_SUM = "B3 counterfactual sum"
COMMITTED = "B4 ledger equals commitment"
FILES = "B14 opened files"
BUCKETS = Variants(with_buckets=lambda buckets: unnormalised.TargetInKey(0, buckets=buckets))

CHEATS = (
    Cheat(
        "pre-quantisation training on val",
        "#1376, #1487, #1972",
        FUTURE,
        scorer(acausal.PreQuantTraining),
    ),
    Cheat("two passes, the second reported", "#846, #868, #888", FUTURE, scorer(acausal.SecondPass)),
    Cheat("the better of two runs", "#573", FUTURE, scorer(acausal.BestOfTwo)),
    Cheat("gate that knows the target", "#659, #1873", SCORED_SUM, scorer(unnormalised.TargetGate)),
    Cheat("anti-hijack gate", "#1858, #1885", SCORED_SUM, scorer(unnormalised.AntiHijack)),
    Cheat(
        "byte mixture, p spread as p^(1/n)",
        "#1835, #1881, #1991",
        SHOWN_SUM,
        scorer(unnormalised.SpreadBytes),
    ),
    Cheat("trie without END", "#1916, #2098, #2138", SHOWN_SUM, scorer(unnormalised.NoEnd)),
    Cheat(
        "hashed cache, target in the key",
        "#770, #779, #788",
        SHOWN_SUM,
        scorer(unnormalised.TargetInKey, BUCKETS),
    ),
    Cheat("one hash bucket", "#886", "B10 one bucket", scorer(unnormalised.TargetInKey, BUCKETS)),
    Cheat(
        "probabilities of whole buckets, shown openly",
        "#978",
        SHOWN_SUM,
        scorer(unnormalised.HashedBuckets),
    ),
    Cheat("SLOT", "#1176, #1229", FUTURE, scorer(acausal.Slot)),
    Cheat("smear across BOS", "#1667, #1797", ORDER, scorer(acausal.SmearAcrossBos)),
    Cheat(
        "within-word expert, gated on the target",
        "#1145, #1420, #2018",
        SCORED_SUM,
        scorer(unnormalised.WithinWord),
    ),
    Cheat("documents sorted by length, state shared", "#1536, #1610", ORDER, scorer(acausal.LongestFirst)),
    Cheat("circular order", "#2130, #2135", ORDER, scorer(acausal.Circular)),
    Cheat(
        "tilt from a table of the future",
        "#1514's like, precomputed",
        FUTURE,
        scorer(acausal.TiltFromTheFuture),
    ),
    Cheat("update before score", "-", SCORED_SUM, scorer(acausal.UpdateFirst)),
    Cheat("look-ahead", "-", FUTURE, scorer(acausal.LookAhead)),
    Cheat("lengths of documents known", "#1536", FUTURE, scorer(acausal.DocumentLength)),
    Cheat("a look at the whole stream first", "#1488", LEDGER, scorer(acausal.PeekAtStream)),
    Cheat("every other target scored", "#1785, #1835", COMMITTED, scorer(acausal.Subset)),
    Cheat("dropped tail", "#1493 to #1855", "B6 coverage", scorer(acausal.DroppedTail)),
    Cheat("forks that share state", "-", "B2 own-token independence", scorer(acausal.SharedState)),
    Cheat("predict() is an update", "-", "B5 reading leaves no trace", scorer(acausal.LooksChange)),
    Cheat("another seed in each run", "#1769", "B13 a second run", scorer(acausal.Dice)),
    Cheat("edited ledger", "-", LEDGER, edited_ledger),
    Cheat("space counted twice", "#1698, #1727, #1734", "B11 denominator", bookkeeping.doubled_space),
    Cheat(
        "byte fallback as three bytes",
        "#1143, #1184, #1289",
        "B11 awkward texts",
        bookkeeping.three_byte_fallback,
    ),
    Cheat(
        "bytes of the transformed text",
        "#2071, #2138",
        "B11 claimed bytes",
        bookkeeping.wrong_denominator,
    ),
    Cheat("number over other bytes", "#2138", "B6 reported bits per byte", bookkeeping.wrong_denominator),
    Cheat("over the cap", "#1835, #1858, #1959", "budget bytes", bookkeeping.over_the_cap),
    Cheat("val documents in train", "#2018, #2118, #2130", "B15 train and val disjoint", bookkeeping.overlap),
    Cheat(
        "val documents in train, tokenized differently",
        "#2127",
        "B15 passages shared by train and val",
        partial(bookkeeping.overlap, spelt=True),
    ),
    Cheat("chosen seeds", "#1769, #2118, #2124", "B16 significance", bookkeeping.chosen_seeds),
    Cheat(
        "calibration on val",
        "#728, #1924",
        FILES,
        bookkeeping.in_clean_room("open('OUTSIDE/val_0.bin').close()"),
    ),
    Cheat(
        "a file outside the counted set",
        "#1437, #1514",
        FILES,
        bookkeeping.in_clean_room("open('OUTSIDE/features.npz').close()"),
    ),
    Cheat(
        "a wrapper that reads the repository",
        "#1858",
        FILES,
        bookkeeping.in_clean_room("sys.path.insert(0, 'OUTSIDE'); import helper"),
    ),
    Cheat(
        "timer started late",
        "#1967",
        "B14 wall clock",
        bookkeeping.in_clean_room("time.sleep(1.5); started = time.monotonic()"),
    ),
)
