"""#1858's byte mixture as it is: equal to a slow version, and shown not to be a probability."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import _ppm, byte_ppm
from stages.common import bpb, shards
from stages.scoring.stream import open_validation_stream
from stages.tokenize import tokenizer
from tests.zoo import lawful

TEXTS = [
    f"Document {i} says that {i * i} is the square of {i}, and that caf\u00e9 costs {i % 7}.\n" * 2
    for i in range(60)
]


def slow_ppm(text: bytes) -> tuple[list[float], list[float]]:
    """With a dictionary of counters, from #1858's description."""
    memory: dict[bytes, Counter[int]] = defaultdict(Counter)
    probabilities, confidences = [], []
    for i, byte in enumerate(text):
        contexts = [text[i - order : i] for order in range(min(5, i), -1, -1)]
        seen = [context for context in contexts if context in memory]
        confidence, escape, probability = 0.0, 1.0, None
        for context in seen:
            counter = memory[context]
            whole = sum(counter.values()) + len(counter)
            if context == seen[0]:
                confidence = max(counter.values()) / whole
            if counter[byte]:
                probability = escape * counter[byte] / whole
                break
            del counter[byte]  # looking made it
            escape *= len(counter) / whole
        probabilities.append(escape / 256 if probability is None else probability)
        confidences.append(confidence)
        for context in contexts:
            memory[context][byte] += 1
    return probabilities, confidences


def fast_ppm(text: bytes, tables: _ppm.Tables) -> tuple[np.ndarray, np.ndarray]:
    probability, confidence = np.empty(len(text)), np.empty(len(text))
    _ppm.predict(np.frombuffer(text, np.uint8), tables, 0, len(text), probability, confidence)
    return probability, confidence


@pytest.mark.parametrize("bits", [6, 16])
def test_the_fast_version_equals_the_slow_one_while_tables_grow(bits: int) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    text = (
        ("".join(TEXTS)).encode()[:4000]
        + bytes(generator.integers(0, 256, 500).astype(np.uint8))
        + b"\0" * 200
    )
    probability, confidence = fast_ppm(text, _ppm.Tables(bits))
    expected = slow_ppm(text)
    np.testing.assert_allclose(probability, expected[0], rtol=1e-12)
    np.testing.assert_allclose(confidence, expected[1], rtol=1e-12)


def test_without_exclusion_the_bytes_sum_to_less_than_one() -> None:
    text = "".join(TEXTS).encode()
    tables = _ppm.Tables()
    fast_ppm(text, tables)
    total = sum(
        _ppm.look(tables.arrays, np.frombuffer(text[-5:] + bytes([byte]), np.uint8), 5)[0]
        for byte in range(256)
    )
    assert 0.5 < total < 1


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("scored")
    (folder / "tokenizer.model").write_bytes(tokenizer.train(TEXTS, 330, 1))
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    tokens = np.concatenate([np.array([1, *processor.encode(text)], dtype=np.uint16) for text in TEXTS])
    shards.write(folder / "val_000000.bin", tokens)
    stream = open_validation_stream(folder, folder / "tokenizer.model")
    return stream, byte_ppm.StreamBytes(stream)


def test_bytes_are_the_text_and_spread_losses_add_up(scored) -> None:
    stream, of = scored
    assert of.text.tobytes() == "".join(TEXTS).encode()
    nll = np.random.Generator(np.random.PCG64(1)).gamma(2.0, 1.0, stream.targets).astype(np.float32)
    found = byte_ppm.score(of, nll, stream.targets)
    assert found["spread_over_bytes_bpb"] == pytest.approx(found["network_bpb"], rel=1e-12)
    assert found["network_bpb"] == pytest.approx(bpb.bits_per_byte(nll, stream.counted_bytes))
    assert found["ppm_bpb"] == pytest.approx(
        -sum(map(math.log2, slow_ppm(of.text.tobytes())[0])) / len(of.text)
    )
    prefix = byte_ppm.score(of, nll, 1000)
    assert prefix["network_bpb"] == pytest.approx(bpb.bits_per_byte(nll[:1000], stream.counted_bytes[:1000]))
    assert prefix["bytes"] == stream.counted_bytes[:1000].sum()
    assert found["gate_skips_share_of_bytes"] == pytest.approx((of.spread(nll) < 0.277).mean())


def test_weight_one_on_the_network_is_the_network() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    nats, probability, confidence = (
        generator.gamma(2.0, 1.0, 1000),
        generator.random(1000),
        generator.random(1000),
    )
    np.testing.assert_allclose(
        byte_ppm.mixture(nats, probability, confidence, gate_nats=np.inf), nats, rtol=1e-12
    )
    plain = byte_ppm.mixture(nats, probability, confidence, gate_nats=-1.0)
    weight = np.where(confidence >= 0.9, 0.05, 0.9)
    np.testing.assert_allclose(np.exp(-plain), weight * np.exp(-nats) + (1 - weight) * probability)
    gated = byte_ppm.mixture(nats, probability, confidence)
    np.testing.assert_array_equal(gated != plain, (nats < 0.277) & (gated != plain))


class Uniform(lawful.Bigram):
    """A lawful network that knows nothing."""

    def predict(self) -> np.ndarray:
        return np.full(330, -math.log(330))

    def observe(self, token: int) -> None:
        pass


def test_what_it_charges_adds_up_to_more_than_one(scored) -> None:
    stream, of = scored
    places = [1500, 2000, 2001, stream.targets - 1]
    found = byte_ppm.counterfactual_sums(of, stream, Uniform(0), places)
    assert found["network_largest_deviation_from_one"] < 1e-9
    assert found["mixture_without_gate"]["mean"] > 2
    assert found["places"] == 4


def test_the_sum_is_one_where_the_network_has_all_the_weight(scored) -> None:
    _, of = scored
    tables = _ppm.Tables()
    law = np.random.Generator(np.random.PCG64(2)).normal(0, 3, 330)
    law -= np.logaddexp.reduce(law)
    nats = byte_ppm.charged(law, of.texts[0], tables, of.text[:100], gate_nats=np.inf)
    assert abs(np.exp(-nats).sum() - 1) < 1e-9
    np.testing.assert_allclose(nats, -law, rtol=1e-9)


def test_the_void_fraction_of_normal_weights() -> None:
    state = {
        "a.weight": torch.randn(400, 500, generator=torch.Generator().manual_seed(0)),
        "b.weight": torch.ones(10),
        "c": torch.ones(9999),
    }
    assert byte_ppm.void_fractions(state) == pytest.approx(
        math.erf(1 / math.sqrt(math.pi)), abs=0.005
    )  # 0.575
    with pytest.raises(ValueError, match="no tensor of more than 1000 weights"):
        byte_ppm.void_fractions({"b.weight": torch.ones(10)})
