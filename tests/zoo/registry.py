"""The zoo's index: every way to cheat that the field knows, who did it, and the test that must convict it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from stages.audit.audit_scorer import Factory
from stages.audit.checks.metamorphic import Variants
from stages.audit.verdict import Verdict
from tests.zoo import causal, harness, lawful, mass, paper
from tests.zoo.harness import SHAVED

Try = Callable[[Path, bytes], list[Verdict]]


class Cheat(NamedTuple):
    """One way to cheat, and what must convict it; others may too."""

    name: str
    seen_in: str
    convicted_by: str
    run: Try


def scorer(factory: Factory, variants: Variants | None = None) -> Try:
    """The trial of a scorer."""
    return lambda folder, key: harness.audit(factory, folder, key=key, variants=variants or Variants())


FUTURE, LEDGER = "B1 future perturbation", "B1 ledger without the future"
GRAPH, SUM, LAW = "B1c dependency graph", "B3 counterfactual sum", "B3 committed distribution sums to one"
COMMITTED, PIECES, FILES = "B4 ledger equals commitment", "B13 whole or in pieces", "B14 opened files"
BUCKETS = Variants(hashed=lambda buckets: mass.TargetInKey(0, buckets=buckets))

CHEATS = (
    Cheat("pre-quantisation training on val", "#1376, #1487, #1972", FUTURE, scorer(causal.PreQuantTraining)),
    Cheat("two passes, the second reported", "#846, #868, #888", FUTURE, scorer(causal.SecondPass)),
    Cheat("the better of two runs", "#573", FUTURE, scorer(causal.BestOfTwo)),
    Cheat("gate that knows the target", "#659, #1873", SUM, scorer(mass.TargetGate)),
    Cheat("anti-hijack gate", "#1858, #1885", SUM, scorer(mass.AntiHijack)),
    Cheat("byte mixture, p spread as p^(1/n)", "#1835, #1881, #1991", LAW, scorer(mass.SpreadBytes)),
    Cheat("trie without END", "#1916, #2098, #2138", LAW, scorer(mass.NoEnd)),
    Cheat("hashed cache, target in the key", "#770, #779, #788", LAW, scorer(mass.TargetInKey, BUCKETS)),
    Cheat("one hash bucket", "#886", "B10 one bucket", scorer(mass.TargetInKey, BUCKETS)),
    Cheat("masses of buckets, shown openly", "#978", LAW, scorer(mass.HashedBuckets)),
    Cheat("SLOT", "#1176, #1229", FUTURE, scorer(causal.Slot)),
    Cheat("smear across BOS", "#1667, #1797", GRAPH, scorer(causal.SmearAcrossBos)),
    Cheat("within-word expert, gated on the target", "#1145, #1420, #2018", SUM, scorer(mass.WithinWord)),
    Cheat("documents sorted by length, state shared", "#1536, #1610", GRAPH, scorer(causal.LongestFirst)),
    Cheat("circular order", "#2130, #2135", GRAPH, scorer(causal.Circular)),
    Cheat(
        "tilt from a table of the future",
        "#1514's like, precomputed",
        FUTURE,
        scorer(causal.TiltFromTheFuture),
    ),
    Cheat("update before score", "-", SUM, scorer(causal.UpdateFirst)),
    Cheat("look-ahead", "-", FUTURE, scorer(causal.LookAhead)),
    Cheat("lengths of documents known", "#1536", FUTURE, scorer(causal.DocumentLength)),
    Cheat("a look at the whole stream first", "#1488", LEDGER, scorer(causal.PeekAtStream)),
    Cheat("every other target scored", "#1785, #1835", COMMITTED, scorer(causal.Subset)),
    Cheat("dropped tail", "#1493 to #1855", "B6 coverage", scorer(causal.DroppedTail)),
    Cheat("forks that share state", "-", "B2 own-token independence", scorer(causal.SharedState)),
    Cheat("asking is an update", "-", "B5 reading leaves no trace", scorer(causal.LooksChange)),
    Cheat("another seed in each run", "#1769", "B13 a second run", scorer(causal.Dice)),
    Cheat(
        "edited ledger",
        "-",
        LEDGER,
        lambda folder, key: harness.audit(lawful.Bigram, folder, lambda nll: nll * SHAVED, key=key),
    ),
    Cheat("space counted twice", "#1698, #1727, #1734", "B11 denominator", paper.doubled_space),
    Cheat(
        "byte fallback as three bytes", "#1143, #1184, #1289", "B11 awkward texts", paper.three_byte_fallback
    ),
    Cheat("bytes of the transformed text", "#2071, #2138", "B11 claimed bytes", paper.wrong_denominator),
    Cheat("number over other bytes", "#2138", "B6 reported bits per byte", paper.wrong_denominator),
    Cheat("over the cap", "#1835, #1858, #1959", "budget bytes", paper.over_the_cap),
    Cheat("val documents in train", "#2018, #2118, #2130", "B15 train and val disjoint", paper.overlap),
    Cheat(
        "val documents in train, tokenized otherwise",
        "#2127",
        "B15 passages shared by train and val",
        partial(paper.overlap, spelt=True),
    ),
    Cheat("chosen seeds", "#1769, #2118, #2124", "B16 significance", paper.chosen_seeds),
    Cheat("calibration on val", "#728, #1924", FILES, paper.in_the_room("open('OUTSIDE/val_0.bin').close()")),
    Cheat(
        "a file outside the counted set",
        "#1437, #1514",
        FILES,
        paper.in_the_room("open('OUTSIDE/features.npz').close()"),
    ),
    Cheat(
        "a wrapper that reads the repository",
        "#1858",
        FILES,
        paper.in_the_room("sys.path.insert(0, 'OUTSIDE'); import helper"),
    ),
    Cheat(
        "timer started late",
        "#1967",
        "B14 wall clock",
        paper.in_the_room("time.sleep(1.5); started = time.monotonic()"),
    ),
)
