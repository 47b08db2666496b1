"""Byte trees, and the logits of a path's decisions: from a distribution, and with a hint put back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.common import bpb
from stages.scoring import byte_tree
from stages.scoring.byte_tree_logits import NO_HINT, DeviceByteTrees
from stages.scoring.queries import Queries
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram import scorer as tilt
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests.byte_inputs import TEXTS, random_log_probs
from tests.factories import SLIDING, TINY, TTT, make_world, random_model, table

MODES = [byte_tree.AFTER_TEXT, byte_tree.AFTER_BOUNDARY]


def slow_path(law: np.ndarray, texts: list[bytes], token: int) -> list[float]:
    """Logits of a token's path, from sets of ids, without an order or intervals.

    There is a decision END where some ids stop and some go on, and one for each bit where both sides exist.
    """
    alive = set(range(len(texts)))
    found = []

    def decide(right: set[int], left: set[int]) -> None:
        if right and left:
            found.append(
                float(np.log(sum(np.exp(law[i]) for i in right) / sum(np.exp(law[i]) for i in left)))
            )

    for depth in range(len(texts[token]) + 1):
        stop = {i for i in alive if len(texts[i]) == depth}
        decide(alive - stop, stop)
        if depth == len(texts[token]):
            return found
        alive -= stop
        for bit in range(7, -1, -1):
            ones = {i for i in alive if texts[i][depth] >> bit & 1}
            decide(ones, alive - ones)
            alive = ones if texts[token][depth] >> bit & 1 else alive - ones
    raise AssertionError


def test_emissions_are_the_counted_bytes(tokenised):
    of, tokens = tokenised
    behind = of.boundary[tokens[:-1]]
    texts = {flag: of.appended_bytes(flag) for flag in (False, True)}
    emitted = [texts[bool(flag)][token] for flag, token in zip(behind, tokens[1:], strict=True)]
    np.testing.assert_array_equal([len(text) for text in emitted], bpb.target_bytes(tokens, of))
    assert b"".join(emitted).decode() == "".join(TEXTS)


@pytest.mark.parametrize("mode", MODES)
def test_a_path_has_the_decisions_of_sets_of_ids_and_the_hint_is_put_back(tokenised, mode):
    of, _ = tokenised
    texts = of.appended_bytes(bool(mode))
    targets = np.arange(0, of.vocab_size, 2)
    modes = np.full_like(targets, mode)
    log_probs = random_log_probs(len(targets), of.vocab_size)

    # Hints in turn: none, the target itself, an id that emits the same bytes if there is one, any id.
    twins = []
    for target in targets:
        same = (i for i, text in enumerate(texts) if text == texts[target] and i != target)
        twins.append(next(same, NO_HINT))
    assert sum(twin != NO_HINT for twin in twins[2::4]) > 2
    generator = np.random.Generator(np.random.PCG64(mode))
    any_id = generator.integers(of.vocab_size, size=len(targets))
    none = np.full(len(targets), NO_HINT)
    hints = np.choose(np.arange(len(targets)) % 4, [none, targets, twins, any_id])

    # The first row has the hints' logits.
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    ids = (torch.from_numpy(row) for row in (targets, hints, modes))
    read = byte_trees.path_logits(torch.from_numpy(log_probs), *ids).numpy()
    assert read.shape == (byte_trees.output_rows, len(targets))
    rows = np.arange(len(targets))
    at_hint = np.where(hints == NO_HINT, np.log(0.5), log_probs[rows, hints])
    np.testing.assert_allclose(read[0], at_hint - np.log(-np.expm1(at_hint)), atol=1e-5)

    # The others have the paths, in which the hints are put back with another logit.
    boosts = np.where(hints == NO_HINT, 0.0, generator.normal(0, 3, len(targets)))
    tilt.apply_to_path(byte_trees.trees, modes, targets, hints, read[0] + boosts, read[1:])
    log_probs[rows, hints] += boosts
    for i, target in enumerate(targets.tolist()):
        expected = slow_path(log_probs[i], texts, target)
        np.testing.assert_allclose(read[1 : 1 + len(expected), i], expected, atol=1e-5)
        assert not read[1 + len(expected) :, i].any()


@pytest.mark.parametrize("mode", MODES)
def test_an_id_of_no_probability_has_a_mass(tokenised, mode):
    of, _ = tokenised
    law = np.full((1, of.vocab_size), -120.0)
    law[0, 7] = 0
    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    for target in range(0, of.vocab_size, 5):
        read = byte_trees.path_logits(
            torch.from_numpy(law), *(torch.tensor([i]) for i in (target, NO_HINT, mode))
        )
        assert torch.isfinite(read).all()


@pytest.mark.parametrize("kind", ["sliding", "sgd", "lora", "tilted"])
def test_every_scorer_answers_what_its_predictions_say(kind):
    tokens = np.random.Generator(np.random.PCG64(2)).integers(4, TINY.vocab_size, 120).astype(np.uint16)
    tokens[::29] = 1
    of = table()
    hints = (np.arange(119) * 7 % TINY.vocab_size) if kind != "tilted" else np.full(119, NO_HINT)
    trees_N = byte_tree.tree_index_after(of.boundary, tokens[:-1])

    def make():
        model = random_model(6)
        if kind == "sliding":
            return SlidingScorer(model, SLIDING, make_world())
        if kind == "lora":
            return LoRAScorer(model, SLIDING, replace(TTT, lora=replace(TTT.lora, lr=0.001)), make_world())
        scorer = TTTScorer(model, SLIDING, TTT, make_world(), 119)
        return tilt.TiltScorer(scorer, 0.05, of.text_hashes, 119) if kind == "tilted" else scorer

    byte_trees = DeviceByteTrees(byte_tree.build_byte_trees(of), torch.device("cpu"))
    pieces = make()
    parts = []

    for first, end in ((0, 1), (1, 50), (50, 120)):
        queries = Queries(hints, trees_N, byte_trees).part(max(0, first - 1), end - 1)
        parts.append(pieces.score(tokens[first:end], queries))
    answers = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(answers[0], make().score_stream(tokens), atol=2e-5)

    one_by_one = make()
    texts = {mode: of.appended_bytes(bool(mode)) for mode in MODES}
    for target in range(0, 119):
        one_by_one.observe(int(tokens[target]))
        if target % 3:
            continue
        law = one_by_one.predict()
        if kind != "tilted":
            assert abs(law[hints[target]] - answers[1, target]) < 1e-4
            law[hints[target]] = -np.inf

        with np.errstate(divide="ignore"):
            expected = slow_path(law, texts[trees_N[target]], int(tokens[target + 1]))
        np.testing.assert_allclose(answers[3 : 3 + len(expected), target], expected, atol=1e-3)
