"""The decoder round trip (B12) and the text compressor: another process restores what was coded.

The file has the size that the losses claim.
"""

import dataclasses
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.audit import probe_runner
from stages.audit.checks import round_trip
from stages.audit.params import Params
from stages.audit.pipeline_scorers import decode_model, scorer_source
from stages.audit.precision import FLOAT32
from stages.audit.remote.process import ScorerProcess
from stages.audit.verdict import Verdict
from stages.calibrate.hessians import hessian_name
from stages.common import config, range_coder
from stages.common.lossless_text import LosslessTokenizer, split_text
from stages.common.progress import Logger
from stages.pack import artifact
from stages.pack.params import PackParams
from stages.pack.quantise import tensor_kinds
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.tokenize import tokenizer
from tests import factories
from tests.audit_inputs import SECTIONS
from tests.pack_inputs import ENCODER
from tests.zoo import acausal, lawful, unnormalised
from tools.compressor import batched_kv as lanes_module
from tools.compressor import cli as codec
from tools.compressor.batched_kv import BatchedScorer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"Document {i} says that {i * i} is the square of {i}, and nothing more.\n" * 2 for i in range(40)]
TOKENS = lawful.random_stream(1200)


def coded_bits(logs: np.ndarray, symbols: np.ndarray) -> float:
    """Size of the symbols' file, after it has been decoded."""
    encoder = range_coder.RangeEncoder()
    starts = [range_coder.cumulative_frequencies(row) for row in logs]
    for row, symbol in zip(starts, symbols.tolist(), strict=True):
        encoder.code(row, symbol)
    payload = encoder.finish()
    decoder = range_coder.RangeDecoder(payload)
    assert [decoder.code(row) for row in starts] == symbols.tolist()
    return 8.0 * len(payload)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("vocab", [2, 257, 8192])
def test_a_file_is_as_long_as_its_probabilities_say(sharpness: float, vocab: int) -> None:
    generator = np.random.Generator(np.random.PCG64(vocab))
    logits = generator.standard_normal((150, vocab)) * sharpness
    logs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    likely = np.array([generator.choice(vocab, p=np.exp(row) / np.exp(row).sum()) for row in logs])
    for symbols in (likely, generator.integers(0, vocab, len(logs)), logs.argmin(1), logs.argmax(1)):
        bits = coded_bits(logs, symbols)
        claim = -logs[np.arange(len(logs)), symbols].sum() / math.log(2)
        assert bits <= claim + range_coder.max_overhead_bits(len(logs), vocab)
        if symbols is likely:
            assert bits >= claim - 1


def test_every_id_has_a_part_and_carries_run_back_through_full_bytes() -> None:
    logs = np.array([0.0, -np.inf, -700.0])
    assert range_coder.cumulative_frequencies(logs).tolist() == [
        0,
        range_coder.TOTAL_FREQUENCY - 2,
        range_coder.TOTAL_FREQUENCY - 1,
        range_coder.TOTAL_FREQUENCY,
    ]
    encoder = range_coder.RangeEncoder()
    encoder.written, encoder.low = bytearray([7, 255, 255]), (1 << 64) - 1
    encoder.code(np.array([0, 1, 4]), 1)
    assert encoder.written[:3] == bytearray([8, 0, 0])


@pytest.mark.parametrize("bad", [np.nan, 0.1, np.inf])
def test_what_is_no_log_probability_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="expected numbers of 0 or less"):
        range_coder.cumulative_frequencies(np.array([-1.0, bad]))


@pytest.mark.parametrize("attention", ["windows", "documents"])
def test_lanes_score_each_stream_as_the_sliding_scorer_does_alone(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "MAX_TOKENS_PER_PASS", 24)  # so that streams are also taken in turn
    params = dataclasses.replace(factories.TINY, attention=attention)
    model = factories.random_model(5, params)
    streams = np.random.Generator(np.random.PCG64(1)).integers(4, params.vocab_size, (3, 41))
    streams[:, 0] = params.bos_id
    sliding = SlidingEvalParams(window=16, stride=5, batch_windows=3, chunk=16)

    lanes = BatchedScorer(
        params,
        model.state_dict(),
        sliding.window,
        sliding.stride,
        streams[:, 0],
        streams.shape[1],
        factories.make_world(),
    )

    # The last stream is left out from its 20th id on.
    found = np.zeros((3, 40))
    for at in range(1, 41):
        kept = 3 if at < 20 else 2
        lanes.keep_first(kept)
        found[:kept, at - 1] = -lanes.predict()[np.arange(kept), streams[:kept, at]]
        lanes.observe(streams[:kept, at])

    alone = []
    for stream in streams.astype(np.uint16):
        alone.append(SlidingScorer(model, sliding, factories.make_world()).score_stream(stream))
    assert np.abs(found[:2] - np.array(alone[:2])).max() < 2e-5
    assert np.abs(found[2, :19] - alone[2][:19]).max() < 2e-5


@pytest.mark.parametrize("cached", [1, 9])
@pytest.mark.parametrize("visits", range(1, 5))
def test_a_pass_that_raised_does_not_shift_the_cache_of_the_next_one(visits: int, cached: int) -> None:
    """At the start of a window and in the middle of it: the same bits as without the failure."""
    model = factories.random_model(5)
    streams = np.random.Generator(np.random.PCG64(1)).integers(4, factories.TINY.vocab_size, (3, 16))

    def scorer() -> BatchedScorer:
        world = factories.make_world()
        return BatchedScorer(factories.TINY, model.state_dict(), 16, 5, streams[:, 0], 16, world)

    remaining = iter(range(visits))

    def fail_later(_module: Any, _arguments: Any) -> None:
        if next(remaining, None) is None:
            raise MemoryError

    failing = scorer()
    undisturbed = scorer()
    for at in range(1, 16):
        if at == cached:
            hooks = [block.register_forward_pre_hook(fail_later) for block in failing.model.blocks]
            with pytest.raises(MemoryError):
                failing.predict()
            for hook in hooks:
                hook.remove()
        assert np.array_equal(failing.predict(), undisturbed.predict())
        failing.observe(streams[:, at])
        undisturbed.observe(streams[:, at])


@pytest.fixture(scope="module")
def lossy() -> LosslessTokenizer:
    """A tokenizer that normalises, removes white space and has U+2581 of its own, like the record's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return LosslessTokenizer(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


@settings(deadline=None, max_examples=30)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_a_tokenizer_that_changes_text_loses_none(lossy: LosslessTokenizer, text: str) -> None:
    assert lossy.decode(lossy.encode(text)) == text.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces \n\n",
        "\u2581 marker",
        "\ufb01 ligature \u00bd",
        "<s> <0x41> </s>",
        "\0\r\n\t\ufeff",
        "a" * 300,
    ],
)
def test_awkward_text_comes_back(lossy: LosslessTokenizer, text: str) -> None:
    assert lossy.decode(lossy.encode(text)) == text.encode("utf-8")
    plain = "Document 3 says that 9 is the square of 3"
    assert len(lossy.encode(plain + text + " and")) <= len(lossy.tokenizer.encode(plain)) + len(
        text.encode()
    ) + len(" and")


def test_text_is_cut_into_parts_that_make_it_up() -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    parts = split_text(text, 7, 100)
    assert "".join(parts) == text
    assert len(parts) <= 14
    assert all(part.endswith("\n") for part in parts)
    assert split_text("x" * 950, 7, 100) == ["x" * 136] * 6 + ["x" * 134]
    assert split_text("", 7, 100) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of random weights with its tokenizer, another model, a text, and parameters."""
    made = tmp_path_factory.mktemp("codec")
    (made / "tokenizer.model").write_bytes(tokenizer.train(TEXTS, 320, 1))
    params = dataclasses.replace(  # shallow, so that a step is short
        factories.TINY,
        vocab_size=320,
        layers=2,
        loops=0,
        loop_first=0,
        loop_last=0,
        parallel_from=1,
        value_tables=1,
    )

    for number, name in enumerate(("model.bin", "other.bin")):
        model = factories.random_model(number, params)
        state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        hessians = {}
        for key, tensor in state.items():
            if tensor_kinds.kind_of(key) != "rest":
                hessians[hessian_name(key)] = torch.eye(tensor.shape[1])
        pack = PackParams(**SECTIONS["pack"])
        packed = artifact.pack(state, hessians, params, pack, ENCODER, Logger(is_main=False))
        (made / name).write_bytes(packed.blob)

    (made / "text.txt").write_text("".join(TEXTS[:4]) + "Na\u00efve \U0001f600  twice\0", encoding="utf-8")
    (made / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    return made


def arguments(folder: Path, verb: str, model: str, source: str, target: str) -> list[str]:
    files = [str(folder / name) for name in (model, source, target)]
    options = [
        "--tokenizer",
        str(folder / "tokenizer.model"),
        "--params",
        str(ROOT / "params.yaml"),
        "--parallel",
        "4",
    ]
    return [verb, *files, *options, "--set", "sliding_eval.window=16", "--set", "sliding_eval.stride=4"]


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        codec.main(arguments(*words))  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert (ended.value.code, len(lines)) == (2, 1)
    return lines[0]


def test_a_fresh_process_restores_the_text_and_another_model_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec.main(arguments(folder, "compress", "model.bin", "text.txt", "text.cadz"))
    words = [
        sys.executable,
        "-m",
        "tools.compressor",
        *arguments(folder, "decompress", "model.bin", "text.cadz", "again.txt"),
    ]
    subprocess.run(words, cwd=ROOT, check=True, timeout=120)
    assert (folder / "again.txt").read_bytes() == (folder / "text.txt").read_bytes()
    assert "another model" in refused(capsys, folder, "decompress", "other.bin", "text.cadz", "x.txt")
    assert not (folder / "x.txt").exists()


def test_damage_is_an_error_and_never_other_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.txt").write_text(TEXTS[0])
    codec.main(arguments(folder, "compress", "model.bin", "short.txt", "short.cadz"))
    blob = (folder / "short.cadz").read_bytes()
    for at in (len(blob) - 9, 13):
        (folder / "bad.cadz").write_bytes(blob[:at] + bytes([blob[at] ^ 64]) + blob[at + 1 :])
        assert "damaged" in refused(capsys, folder, "decompress", "model.bin", "bad.cadz", "x.txt")

    # A length that the file cannot have, and cut files.
    lengths = codec.HEADER_LAYOUT.size + blob[codec.HEADER_LAYOUT.size - 1]
    (folder / "bad.cadz").write_bytes(blob[:lengths] + b"\xff\xff\xff\xff\x0f" + blob[lengths + 2 :])
    assert "side by side" in refused(capsys, folder, "decompress", "model.bin", "bad.cadz", "x.txt")
    for cut_at, word in ((3, "not a file"), (codec.HEADER_LAYOUT.size + 5, "ends within")):
        (folder / "bad.cadz").write_bytes(blob[:cut_at])
        assert word in refused(capsys, folder, "decompress", "model.bin", "bad.cadz", "x.txt")

    # Files of other kinds.
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8" in refused(capsys, folder, "compress", "model.bin", "bad.txt", "x.cadz")
    for model, source, message in (
        ("none.bin", "short.cadz", "none.bin does not exist; run `dvc repro pack` first, or name another"),
        ("short.txt", "short.cadz", "short.txt: not a model file"),
        ("model.bin", "none.cadz", "none.cadz does not exist; name another"),
        ("model.bin", "", "is a folder, expected a file; name another"),
        ("model.bin", "short.txt", "short.txt: not a file of this compressor"),
    ):
        assert message in refused(capsys, folder, "decompress", model, source, "x.txt")

    # An empty text is not an error.
    (folder / "empty.txt").write_bytes(b"")
    codec.main(arguments(folder, "compress", "model.bin", "empty.txt", "empty.cadz"))
    codec.main(arguments(folder, "decompress", "model.bin", "empty.cadz", "empty.again"))
    assert (folder / "empty.again").read_bytes() == b""


class Remembers(lawful.Bigram):
    """C1: the process that coded knows the stream, and the one that decodes does not."""

    STREAM = TOKENS

    def predict(self) -> np.ndarray:
        logs = super().predict()
        if self.observed >= len(self.STREAM):
            return logs
        sure = np.full(lawful.VOCAB, math.log(0.01 / lawful.VOCAB))
        sure[self.STREAM[self.observed]] = math.log(0.99)
        return sure


class RemembersNothing(Remembers):
    """The same in a process that was never shown the stream."""

    STREAM = np.empty(0, dtype=np.uint16)


def check(
    scorer: type[lawful.Bigram],
    start: int = 300,
    count: int = 300,
    decoder: type[lawful.Bigram] | None = None,
) -> Verdict:
    encoded = round_trip.encode_span(scorer(len(TOKENS) - 1), TOKENS, start, count, None)

    def decode() -> np.ndarray:
        decoding = (decoder or scorer)(len(TOKENS) - 1)
        return round_trip.decode_span(decoding, TOKENS[:start], encoded.payload, count)

    return round_trip.judge(scorer.__name__, encoded, decode, 1e-6)


def test_a_lawful_score_is_a_file_that_a_fresh_process_reads() -> None:
    verdict = check(lawful.Bigram)
    assert verdict.outcome == "pass", verdict.evidence
    assert verdict.saw is not None
    assert verdict.expected is not None
    assert verdict.bound is not None
    assert verdict.expected - 1 < verdict.saw <= verdict.expected + verdict.bound


@pytest.mark.parametrize(
    "scorer",
    [
        acausal.LookAhead,
        acausal.SecondPass,
        unnormalised.TargetGate,
        acausal.UpdateFirst,
        unnormalised.HashedBuckets,
    ],
)
def test_a_claim_below_the_file_fails(scorer: type[lawful.Bigram]) -> None:
    verdict = check(scorer)
    assert verdict.outcome == "fail"
    assert "not a code length" in verdict.evidence


def test_a_coder_that_knows_the_stream_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wrongly" in check(Remembers, decoder=RemembersNothing).evidence
    monkeypatch.setattr(lawful.Bigram, "predict", lambda self: np.full(lawful.VOCAB, np.nan))
    with pytest.raises(probe_runner.ProtocolError, match="predict"):
        check(lawful.Bigram)


def test_the_pipelines_scorer_decodes_across_an_update_in_another_process(folder: Path) -> None:
    params = config.build(SECTIONS, Params)
    tokens = np.random.Generator(np.random.PCG64(2)).integers(4, 320, 400).astype(np.uint16)
    paths = {"weights": folder / "weights.safetensors", "tokenizer": folder / "tokenizer.model"}
    decode_model(folder / "model.bin", paths["weights"])
    source = scorer_source("ttt_eval", params, params.parallel, FLOAT32, paths, len(tokens) - 1)
    with ScorerProcess(source, 320, 60) as process:
        encoded = round_trip.encode_span(process.new_scorer(), tokens, 240, 30, None)

    def decode() -> np.ndarray:
        with ScorerProcess(source, 320, 60) as process:
            return round_trip.decode_span(process.new_scorer(), tokens[:240], encoded.payload, 30)

    verdict = round_trip.judge("ttt_eval", encoded, decode, 1e-4)
    assert verdict.outcome == "pass", verdict.evidence
