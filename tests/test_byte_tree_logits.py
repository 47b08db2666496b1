"""The tree of emitted bytes, and the logits of a path's decisions: read from a distribution, and with a hint put back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.common import bpb
from stages.scoring import byte_tree
from stages.scoring.byte_tree_logits import NO_HINT, Forest
from stages.scoring.queries import Asked
from stages.sliding_eval.scorer import SlidingScorer
from stages.tokenize import tokenizer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram import scorer as tilt
from stages.ttt_eval.sgd.scorer import TTTScorer
from tests.factories import TINY, TTT, random_model, table, world
from tests.test_ttt_eval import SLIDING

TEXTS = [
    f"Document {i} says that {i * i} is the square of {i}, and that caf\u00e9 costs {i % 7}.\n" * 2
    for i in range(60)
]
MODES = [byte_tree.AFTER_TEXT, byte_tree.AFTER_BOUNDARY]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[bpb.ByteTable, np.ndarray]:
    """A tokenizer's table, and its tokens of some texts."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.train(TEXTS, 330, 1))
    processor = bpb.load_tokenizer(path)
    tokens = np.concatenate(
        [np.array([processor.bos_id(), *processor.encode(text)], dtype=np.uint16) for text in TEXTS]
    )
    return bpb.byte_table(processor), tokens


def random_laws(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Peaked laws, as a network has them: log-probabilities, (count, V)."""
    logits = np.random.Generator(np.random.PCG64(seed)).normal(0, 4, (count, vocab))
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def slow_path(law: np.ndarray, texts: list[bytes], token: int) -> list[float]:
    """From sets of ids, without order or intervals: END where some stop and some go on, then bits where both sides exist."""
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


def test_emissions_are_the_counted_bytes(trained):
    of, tokens = trained
    behind = of.boundary[tokens[:-1]]
    texts = {flag: of.emissions(flag) for flag in (False, True)}
    emitted = [texts[bool(flag)][token] for flag, token in zip(behind, tokens[1:], strict=True)]
    np.testing.assert_array_equal([len(text) for text in emitted], bpb.target_bytes(tokens, of))
    assert b"".join(emitted).decode() == "".join(TEXTS)


@pytest.mark.parametrize("mode", MODES)
def test_a_path_has_the_decisions_of_sets_of_ids_and_the_hint_is_put_back(trained, mode):
    of, _ = trained
    forest = Forest(byte_tree.of_table(of), torch.device("cpu"))
    texts, generator = of.emissions(bool(mode)), np.random.Generator(np.random.PCG64(mode))
    targets = np.arange(0, of.vocab_size, 2)
    laws = random_laws(len(targets), of.vocab_size)
    # No hint, the target itself, one that emits the same bytes where there is one, any.
    twins = [
        next((i for i, text in enumerate(texts) if text == texts[target] and i != target), NO_HINT)
        for target in targets
    ]
    hints = np.choose(
        np.arange(len(targets)) % 4,
        [
            np.full(len(targets), NO_HINT),
            targets,
            twins,
            generator.integers(of.vocab_size, size=len(targets)),
        ],
    )
    assert sum(twin != NO_HINT for twin in twins[2::4]) > 2
    boosts, places = (
        np.where(hints == NO_HINT, 0.0, generator.normal(0, 3, len(targets))),
        np.arange(len(targets)),
    )
    read = forest.read(
        torch.from_numpy(laws),
        *(torch.from_numpy(ids) for ids in (targets, hints, np.full_like(hints, mode))),
    ).numpy()
    assert read.shape == (forest.rows, len(targets))
    at_hint = np.where(hints == NO_HINT, np.log(0.5), laws[places, hints])
    np.testing.assert_allclose(read[0], at_hint - np.log(-np.expm1(at_hint)), atol=1e-5)
    tilt.bend(forest.trees, np.full_like(hints, mode), targets, hints, read[0] + boosts, read[1:])
    laws[places, hints] += boosts
    for i, target in enumerate(targets.tolist()):
        expected = slow_path(laws[i], texts, target)
        np.testing.assert_allclose(read[1 : 1 + len(expected), i], expected, atol=1e-5)
        assert not read[1 + len(expected) :, i].any()


@pytest.mark.parametrize("mode", MODES)
def test_an_id_of_no_probability_has_a_mass(trained, mode):
    of, _ = trained
    law = np.full((1, of.vocab_size), -120.0)
    law[0, 7] = 0
    forest = Forest(byte_tree.of_table(of), torch.device("cpu"))
    for target in range(0, of.vocab_size, 5):
        read = forest.read(torch.from_numpy(law), *(torch.tensor([i]) for i in (target, NO_HINT, mode)))
        assert torch.isfinite(read).all()


@pytest.mark.parametrize("kind", ["sliding", "sgd", "lora", "tilted"])
def test_every_scorer_answers_what_its_predictions_say(kind):
    tokens = np.random.Generator(np.random.PCG64(2)).integers(4, TINY.vocab_size, 120).astype(np.uint16)
    tokens[::29] = 1
    of = table()
    hints = (np.arange(119) * 7 % TINY.vocab_size) if kind != "tilted" else np.full(119, NO_HINT)
    trees_N = byte_tree.numbers_behind(of.boundary, tokens[:-1])

    def make():
        model = random_model(6)
        if kind == "sliding":
            return SlidingScorer(model, SLIDING, world())
        if kind == "lora":
            return LoRAScorer(model, SLIDING, replace(TTT, lora=replace(TTT.lora, lr=0.001)), world())
        scorer = TTTScorer(model, SLIDING, TTT, world(), 119)
        return tilt.TiltScorer(scorer, 0.05, of.codes, 119) if kind == "tilted" else scorer

    forest = Forest(byte_tree.of_table(of), torch.device("cpu"))
    pieces, parts = make(), []
    for first, end in ((0, 1), (1, 50), (50, 120)):
        asked = Asked(np.stack((hints, trees_N))[:, max(0, first - 1) : end - 1], forest)
        parts.append(pieces.score(tokens[first:end], asked))
    answers = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(answers[0], make().score_stream(tokens), atol=2e-5)
    one_by_one, texts = make(), {mode: of.emissions(bool(mode)) for mode in MODES}
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
