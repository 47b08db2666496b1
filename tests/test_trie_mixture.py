"""The tree of emitted bytes and the mixture on it: one law over all tokens, the network's own where the weights say so."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import _mixer, _trie
from benchmarks.trie_mixture import decide
from stages import bpb
from stages.tokenize import tokenizer

TEXTS = [f"Document {i} says that {i * i} is the square of {i}, and that caf\u00e9 costs {i % 7}.\n" * 2 for i in range(60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[_trie.Trie, _trie.Trie], np.ndarray, bpb.ByteTable, list[list[bytes]]]:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer.train(TEXTS, 330, 1))
    processor = bpb.load_tokenizer(path)
    table = bpb.byte_table(processor)
    texts = [_trie.emissions(processor, table, mode) for mode in (_trie.AFTER_TEXT, _trie.AFTER_CONTROL)]
    tokens = np.concatenate([np.array([table.bos, *processor.encode(text)], dtype=np.uint16) for text in TEXTS])
    return (_trie.build(texts[0]), _trie.build(texts[1])), tokens, table, texts


def random_laws(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Peaked laws, as a network has them."""
    logits = np.random.Generator(np.random.PCG64(seed)).normal(0, 4, (count, vocab))
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]


def modes_of(tokens: np.ndarray, table: bpb.ByteTable) -> np.ndarray:
    return np.where(table.boundary[tokens[:-1]], _trie.AFTER_CONTROL, _trie.AFTER_TEXT)


def test_emissions_are_the_counted_bytes(world):
    _, tokens, table, texts = world
    modes = modes_of(tokens, table)
    emitted = [texts[mode][token] for mode, token in zip(modes, tokens[1:], strict=True)]
    np.testing.assert_array_equal([len(text) for text in emitted], bpb.target_bytes(tokens, table))
    assert b"".join(emitted).decode() == "".join(TEXTS)


def slow_logits(law: np.ndarray, texts: list[bytes], token: int) -> list[float]:
    """From sets of ids, without order or intervals: END where some stop and some go on, then bits where both sides exist."""
    alive = set(range(len(texts)))
    found = []

    def decide_(right: set[int], left: set[int]) -> None:
        if right and left:
            found.append(float(np.log(sum(np.exp(law[i]) for i in right) / sum(np.exp(law[i]) for i in left))))

    for depth in range(len(texts[token]) + 1):
        stop = {i for i in alive if len(texts[i]) == depth}
        decide_(alive - stop, stop)
        if depth == len(texts[token]):
            return found
        alive -= stop
        for bit in range(7, -1, -1):
            ones = {i for i in alive if texts[i][depth] >> bit & 1}
            decide_(ones, alive - ones)
            alive = ones if texts[token][depth] >> bit & 1 else alive - ones
    raise AssertionError


@pytest.mark.parametrize("mode", [_trie.AFTER_TEXT, _trie.AFTER_CONTROL])
def test_paths_equal_sets_of_ids(world, mode):
    tries, _, _, texts = world
    law = random_laws(1, len(texts[0]))[0]
    sums, out = _trie.masses(law, tries[mode]), np.empty(_mixer.DECISIONS)
    for token in range(0, len(law), 7):
        count = _trie.path_logits(sums, tries[mode], token, out)
        np.testing.assert_allclose(out[:count], slow_logits(law, texts[mode], token), atol=1e-6)


def run(world, rate: float, count: int | None = None, seed: int = 5):
    """The losses of a stream under random laws, the laws, and the state behind it."""
    tries, tokens, table, _ = world
    tokens = tokens if count is None else tokens[: count + 1]
    laws = random_laws(len(tokens) - 1, table.vocab_size, seed)
    targets, modes = tokens[1:].astype(np.int64), modes_of(tokens, table)
    logits, within = np.empty(len(targets) * 60), np.empty(len(targets))
    used = decide(laws, tries, targets, modes, logits, within)
    state, nats = _mixer.State(int(bpb.target_bytes(tokens, table).sum())), np.empty(len(targets))
    _mixer.follow(state.arrays, tries, targets, modes, logits[:used], within, rate, nats)
    return nats, laws, state


def test_weight_one_on_the_network_is_its_loss_and_token_loss_is_telescoped_byte_loss(world):
    nats, laws, _ = run(world, 0.0)
    np.testing.assert_allclose(nats, -laws[np.arange(len(nats)), world[1][1:]], atol=1e-8)


def test_it_learns(world):
    nats, laws, _ = run(world, 0.02)
    plain = -laws[np.arange(len(nats)), world[1][1:]]
    assert nats[len(nats) // 2 :].mean() < 0.5 * plain[len(nats) // 2 :].mean()


@pytest.mark.parametrize("mode", [_trie.AFTER_TEXT, _trie.AFTER_CONTROL])
def test_the_counterfactual_sum_is_one_late_in_the_stream(world, mode):
    tries, tokens, table, _ = world
    places = np.random.Generator(np.random.PCG64(2)).integers(len(tokens) // 2, len(tokens) - 1, 4)
    for place in places.tolist():
        _, _, state = run(world, 0.02, place)
        law, logq = random_laws(1, table.vocab_size, place)[0], np.empty(table.vocab_size)
        before = [array.copy() for array in (state.counts, state.weights, state.registers)]
        _mixer.law(state.arrays, tries[mode], _trie.masses(law, tries[mode]), logq)
        assert abs(np.exp(logq).sum() - 1) < 1e-9
        assert np.abs(logq - law).max() > 0.1
        assert all(np.array_equal(a, b) for a, b in zip(before, (state.counts, state.weights, state.registers), strict=True))


def test_what_is_charged_is_the_law_s(world):
    tries, tokens, table, _ = world
    for place in (200, 900, 1500):
        nats, laws, _ = run(world, 0.02, place + 1)
        _, _, state = run(world, 0.02, place)
        mode, logq = modes_of(tokens[: place + 2], table)[place], np.empty(table.vocab_size)
        # `run` draws the same laws for both lengths, row by row.
        _mixer.law(state.arrays, tries[mode], _trie.masses(laws[place], tries[mode]), logq)
        assert nats[place] == pytest.approx(-logq[tokens[place + 1]], abs=1e-9)
