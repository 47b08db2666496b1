"""List of all known cheats: where each was seen, and the check of the audit that must detect it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


def edited_ledger(edit: Callable[[np.ndarray], np.ndarray], factory: ScorerFactory = lawful.Bigram) -> Trial:
    """Build the trial of a lawful scorer whose ledger was made smaller."""
    return lambda folder, key: harness.audit(factory, folder, edit=edit, key=key)


def lower_all(nats: float) -> Callable[[np.ndarray], np.ndarray]:
    """Build the edit that lowers every loss by `nats`, though not below zero."""
    return lambda nll: np.maximum(nll - np.float32(nats), 0)


def halve_some(period: int) -> Callable[[np.ndarray], np.ndarray]:
    """Build the edit that halves the largest loss in each `period` targets."""

    def edit(nll: np.ndarray) -> np.ndarray:
        edited = nll.copy()
        for start in range(0, len(nll), period):
            edited[start + int(nll[start : start + period].argmax())] /= 2
        return edited

    return edit


FUTURE = "B1 future perturbation"
LEDGER = "B1 ledger without the future"
ORDER = "B1c dependency graph"
SHOWN_SUM = "B3 committed distribution sums to one"
SCORED_SUM = "B3 counterfactual sum"
COMMITTED = "B4 ledger equals commitment"
CERTIFIED = "B17 ledger equals certified score"
CERTIFIED_SUMS = "B17 certified sums"
FILES = "B14 opened files"
LINKS = "B14 links, mounts and sockets"
ALONE = "B14 runs from the counted files alone"
ORIGINAL = "B11 original text"
PASSAGES = "B15 passages shared by train and val"
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
    Cheat("edited ledger", "-", LEDGER, edited_ledger(lambda nll: nll * harness.SHAVED)),
    Cheat("gate at one context in 200", "-", CERTIFIED, scorer(unnormalised.RareGate)),
    Cheat("sum of 1.5 at one context in 300", "-", CERTIFIED_SUMS, scorer(unnormalised.RareExcess)),
    Cheat("lawful at first, not deep in the stream", "-", CERTIFIED, scorer(acausal.LawfulAtFirst)),
    Cheat("all losses lowered by less than a tolerance", "-", CERTIFIED, edited_ledger(lower_all(5e-6))),
    Cheat(
        "the same in bfloat16",
        "-",
        CERTIFIED,
        edited_ledger(lower_all(0.0046), lawful.BFloat16Logits),
    ),
    Cheat("three losses edited", "-", CERTIFIED, edited_ledger(halve_some(1000))),
    Cheat("a gain at one target in 100", "-", CERTIFIED, edited_ledger(halve_some(100))),
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
    Cheat("30 MB in the scorer's package", "-", "budget bytes", bookkeeping.beside_the_module),
    Cheat("answers in names of files", "-", "budget bytes", bookkeeping.in_names),
    Cheat("answers in a tokenizer's field", "-", "B11 tokenizer file", bookkeeping.stuffed_tokenizer),
    Cheat(
        "answers in a tokenizer's piece",
        "-",
        "B11 tokenizer file",
        partial(bookkeeping.stuffed_tokenizer, in_piece=True),
    ),
    Cheat("normaliser adds bytes", "-", "B11 normaliser adds no bytes", bookkeeping.inflating_tokenizer),
    Cheat(
        "normaliser adds bytes, seen in the text",
        "-",
        ORIGINAL,
        partial(bookkeeping.inflating_tokenizer, with_text=True),
    ),
    Cheat("padded text", "-", ORIGINAL, bookkeeping.padded_text),
    Cheat("shortened text", "-", ORIGINAL, bookkeeping.shortened_text),
    Cheat("a part as the official stream", "#1785", "B11 official totals", bookkeeping.part_as_official),
    Cheat("number of another run", "-", "B6 claimed bits per byte", bookkeeping.number_of_another_run),
    Cheat("val documents in train", "#2018, #2118, #2130", "B15 train and val disjoint", bookkeeping.overlap),
    Cheat(
        "val documents in train, tokenized differently",
        "#2127",
        PASSAGES,
        partial(bookkeeping.overlap, spelt=True),
    ),
    Cheat(
        "74 % of each val document in train",
        "-",
        PASSAGES,
        partial(bookkeeping.changed_copies, change=bookkeeping.first_part),
    ),
    Cheat(
        "val in train, in capitals",
        "-",
        PASSAGES,
        partial(bookkeeping.changed_copies, change=str.upper),
    ),
    Cheat(
        "val in train, one word in eight changed",
        "-",
        PASSAGES,
        partial(bookkeeping.changed_copies, change=bookkeeping.one_word_in_eight),
    ),
    Cheat(
        "val in train, with quoting marks",
        "-",
        PASSAGES,
        partial(bookkeeping.changed_copies, change=bookkeeping.quoted),
    ),
    Cheat(
        "val in train, in pieces of 49 bytes",
        "-",
        PASSAGES,
        partial(bookkeeping.changed_copies, change=bookkeeping.scattered),
    ),
    Cheat("chosen seeds", "#1769, #2118, #2124", "B16 significance", bookkeeping.chosen_seeds),
    Cheat(
        "one seed under three names",
        "-",
        "B16 significance",
        bookkeeping.one_seed_under_three_names,
    ),
    Cheat("one run under three seeds", "-", "B16 significance", bookkeeping.one_run_under_three_seeds),
    Cheat(
        "losses of seeds beside their ledgers",
        "-",
        "B16 significance",
        bookkeeping.losses_beside_the_ledgers,
    ),
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
        ALONE,
        bookkeeping.in_clean_room("sys.path.insert(0, 'OUTSIDE'); import helper"),
    ),
    Cheat(
        "a link into the folder",
        "-",
        LINKS,
        bookkeeping.in_clean_room("os.link('OUTSIDE/features.npz', 'mine')"),
    ),
    Cheat(
        "a renaming into the folder",
        "-",
        LINKS,
        bookkeeping.in_clean_room("os.rename('OUTSIDE/features.npz', 'mine')"),
    ),
    Cheat(
        "a link that leads outside",
        "-",
        LINKS,
        bookkeeping.in_clean_room("os.symlink('OUTSIDE', 'mine'); open('mine/features.npz')"),
    ),
    Cheat(
        "a bind mount",
        "-",
        LINKS,
        bookkeeping.in_clean_room(
            "import ctypes; ctypes.CDLL(None).mount(b'OUTSIDE', b'/tmp', None, 4096, None)"
        ),
    ),
    Cheat(
        "answers of a server, through a socket in a file",
        "-",
        LINKS,
        bookkeeping.in_clean_room("socket.socket(socket.AF_UNIX).connect('OUTSIDE/socket')"),
    ),
    Cheat(
        "answers in SysV shared memory",
        "-",
        LINKS,
        bookkeeping.in_clean_room("import ctypes; ctypes.CDLL(None).shmget(1234, 100, 0o1666)"),
    ),
    Cheat("answers in /dev/shm", "-", ALONE, bookkeeping.answers_in_shared_memory),
    Cheat(
        "a process that outlives the run",
        "-",
        ALONE,
        bookkeeping.in_clean_room(
            "subprocess.Popen([sys.executable, '-c', 'import os, time; time.sleep(0.5); os.mkdir(\"eval\"); "
            'open("eval/metrics.json", "w").write("{\\"toy_bpb\\": 1.25}")\'], start_new_session=True); '
            "sys.exit(0)"
        ),
    ),
    Cheat(
        "timer started late",
        "#1967",
        "B14 wall clock",
        bookkeeping.in_clean_room("time.sleep(1.5); started = time.monotonic()"),
    ),
)
