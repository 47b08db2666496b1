import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.common import ledger, paired_bootstrap, shards
from stages.common.bpb import bits_per_byte
from stages.common.progress import Logger
from stages.scoring.evaluate import Evaluation, score, write_results
from stages.scoring.stream import ValidationStream, open_stream_for_model
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.sliding_eval.windows import plan_windows, window_start
from stages.train.reference import softcapped
from tests.factories import SLIDING, TINY, make_world, random_model, two_byte_table


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.Generator(np.random.PCG64(seed)).integers(4, TINY.vocab_size, count).astype(np.uint16)
    tokens[0] = 1
    return tokens


def scorer(params: SlidingEvalParams = SLIDING) -> SlidingScorer:
    return SlidingScorer(random_model(6), params, make_world())


# The plan


def record_plan(targets: int, window: int, stride: int) -> dict[int, int]:
    """Target -> start of the window that scores it, window by window as #1493 describes it."""
    scored: dict[int, int] = {}
    start = 0
    while start == 0 or start + window - stride < targets:
        first = 0 if start == 0 else start + window - stride
        for target in range(first, min(start + window, targets)):
            assert target not in scored
            scored[target] = start
        start += stride
    return scored


@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 40))
def test_plan_equals_the_record_s_and_scores_each_target_once(targets, window, stride):
    stride = min(stride, window)
    expected = record_plan(targets, window, stride)
    assert sorted(expected) == list(range(targets))
    found = {
        target: w.start for w in plan_windows(0, targets, window, stride) for target in range(w.first, w.end)
    }
    assert found == expected
    assert all(window_start(target, window, stride) == start for target, start in expected.items())


@given(st.integers(1, 300), st.data())
def test_a_plan_in_pieces_is_the_plan(targets, data):
    cut = data.draw(st.integers(0, targets))
    whole = {t: w.start for w in plan_windows(0, targets, 16, 4) for t in range(w.first, w.end)}
    pieces = {
        t: w.start
        for part in (plan_windows(0, cut, 16, 4), plan_windows(cut, targets, 16, 4))
        for w in part
        for t in range(w.first, w.end)
    }
    assert pieces == whole


def test_the_record_s_number_of_windows():
    """633,409 windows for 40,540,160 targets, as in #1493: counted by arithmetic, not by listing them."""
    window, stride, targets = 2048, 64, 40_540_160
    assert window_start(targets - 1, window, stride) // stride + 1 == 633_409


# The scorer


def test_scores_equal_one_forward_pass_for_each_target():
    tokens = tokens_of(75)
    model = random_model(6)
    expected = []
    with torch.no_grad():
        for target in range(74):
            start = record_plan(74, 16, 4)[target]
            context = torch.from_numpy(tokens[start : target + 1].astype(np.int64))[None]
            expected.append(
                -float(torch.log_softmax(model.logits(context)[0, -1].double(), -1)[int(tokens[target + 1])])
            )
    nll = scorer().score_stream(tokens)
    assert nll.dtype == np.float32
    np.testing.assert_allclose(nll, expected, atol=2e-5)


def test_pieces_predictions_and_the_whole_stream_agree():
    tokens = tokens_of(90)
    whole = scorer().score_stream(tokens)
    assert whole.shape == (89,)
    in_pieces = scorer()
    pieces = np.concatenate([in_pieces.score_stream(part) for part in np.split(tokens, [1, 2, 17, 40, 41])])
    np.testing.assert_allclose(pieces, whole, atol=2e-5)
    one_by_one = scorer()
    one_by_one.observe(int(tokens[0]))
    for target in range(60):
        distribution = one_by_one.predict()
        assert distribution.shape == (TINY.vocab_size,)
        assert abs(np.logaddexp.reduce(distribution)) < 1e-12
        assert abs(distribution[tokens[target + 1]] + whole[target]) < 2e-5
        one_by_one.observe(int(tokens[target + 1]))


def test_a_fork_is_independent():
    tokens = tokens_of(60)
    s = scorer()
    s.score_stream(tokens[:30])
    twin = s.fork()
    twin.score_stream(tokens_of(20, seed=9))
    np.testing.assert_array_equal(
        s.score_stream(tokens[30:]), scorer_after(tokens[:30]).score_stream(tokens[30:])
    )


def scorer_after(tokens: np.ndarray) -> SlidingScorer:
    s = scorer()
    s.score_stream(tokens)
    return s


def test_cached_predictions_are_those_of_a_pass_over_the_window():
    """One after another, with gaps, twice at one place, after a fork, and scores from them."""
    tokens = tokens_of(90)
    one = scorer()
    one.observe(int(tokens[0]))
    for position in range(1, len(tokens)):
        if position % 7 not in (3, 4):
            cached = one.predict()
            assert cached.tobytes() == one.predict().tobytes()
            assert one._uses_cache

            # The same from a fork, which has no cache, and from the whole window.
            twin = one.fork()
            twin.cache = None
            start = window_start(position - 1, SLIDING.window, SLIDING.stride)
            z_V = softcapped(twin._window_logits(start), TINY.logit_softcap)
            whole = torch.log_softmax(z_V.detach().double(), dim=-1).numpy()
            np.testing.assert_allclose(cached, whole, rtol=0, atol=2e-5)
            np.testing.assert_allclose(one.fork().predict(), whole, rtol=0, atol=2e-5)

            # The loss of the token that was predicted.
            loss = one.fork().score_stream(tokens[position : position + 1])[0]
            kept = one.fork()
            kept.predict()
            assert abs(kept.score_stream(tokens[position : position + 1])[0] - loss) < 2e-5
            assert abs(loss + cached[tokens[position]]) < 2e-5
        one.observe(int(tokens[position]))


def test_nothing_is_predicted_before_the_first_token():
    with pytest.raises(ValueError, match="the first token of a stream is given"):
        scorer().predict()


def test_batching_does_not_change_the_scores():
    tokens = tokens_of(200)
    one = scorer(SlidingEvalParams(16, 4, 1, 32)).score_stream(tokens)
    many = scorer(SlidingEvalParams(16, 4, 50, 32)).score_stream(tokens)
    np.testing.assert_allclose(one, many, atol=2e-5)


# Results


def test_results_are_written_and_agree(tmp_path):
    tokens = tokens_of(100)
    stream = ValidationStream(tokens, np.full(99, 2, dtype=np.int64), two_byte_table())
    nll = score(scorer(), stream)
    bpb = bits_per_byte(nll, stream.counted_bytes)
    written: dict[str, Any] = {}
    run: Any = SimpleNamespace(output=tmp_path, write_json=written.__setitem__)
    write_results(run, "sliding", Evaluation(nll, bpb, stream), 32)
    assert written["metrics.json"]["sliding_bpb"] == bpb
    assert written["metrics.json"]["sliding_targets"] == 99
    assert bpb == pytest.approx(float(nll.sum(dtype=np.float64)) / np.log(2) / 198, rel=1e-12)
    np.testing.assert_array_equal(ledger.read(tmp_path / "nll.npy", 99), nll)
    rows = [line.split("\t") for line in (tmp_path / "chunks.tsv").read_text().splitlines()]
    assert tuple(rows[0]) == ledger.CHUNK_COLUMNS
    assert [int(row[2]) for row in rows[1:]] == [32, 32, 32, 3]
    assert float(rows[-1][5]) == pytest.approx(bpb, abs=1e-6)
    json.dumps(written)


class Short:
    vocab_size = TINY.vocab_size

    def score_stream(self, tokens):
        return np.zeros(len(tokens) - 2, dtype=np.float32)


class Holes(Short):
    def score_stream(self, tokens):
        return np.full(len(tokens) - 1, np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(Short, "every target is scored exactly once"), (Holes, "every target needs one finite loss")],
)
def test_a_dropped_tail_or_a_hole_is_an_error(bad, message):
    """D9, D11."""
    with pytest.raises(ValueError, match=message):
        score(bad(), ValidationStream(tokens_of(50), np.full(49, 2), two_byte_table()))


def test_ledgers_of_another_stream_are_refused(tmp_path):
    ledger.write(tmp_path / "nll.npy", np.ones(10, dtype=np.float32))
    with pytest.raises(ValueError, match="belongs to another stream"):
        ledger.read(tmp_path / "nll.npy", 11)
    (tmp_path / "nll.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="is not a ledger"):
        ledger.read(tmp_path / "nll.npy", 10)


def test_the_paired_interval_covers_a_known_difference():
    generator = np.random.Generator(np.random.PCG64(0))
    documents = np.repeat(np.arange(60), 50)
    a = generator.gamma(2.0, 1.0, 3000).astype(np.float32)
    b = (a - 0.01 + generator.normal(0, 0.02, 3000)).clip(0).astype(np.float32)
    gain = paired_bootstrap.paired_difference(a, b, np.full(3000, 3), documents)
    assert gain.low < gain.bpb < gain.high < 0
    assert gain.bpb == pytest.approx(float((b.astype(float) - a).sum()) / np.log(2) / 9000, rel=1e-9)
    assert gain.high - gain.low < 0.002


def test_too_short_or_foreign_streams(tmp_path, shared_data):
    tokenizer = shared_data / "tokenizers/fineweb_1024_bpe.model"
    shards.write(tmp_path / "val_000000.bin", np.array([1, 5, 6], dtype=np.uint16))
    with pytest.raises(ValueError, match="2 targets are fewer than one window of 16"):
        open_stream_for_model(tmp_path, tokenizer, 1024, 16)
    with pytest.raises(ValueError, match="has 1024 ids, but the model was trained on 37"):
        open_stream_for_model(tmp_path, tokenizer, 37, 16)
    shards.write(tmp_path / "val_000000.bin", np.array([5, 1, 6], dtype=np.uint16))
    with pytest.raises(ValueError, match="does not begin with BOS"):
        open_stream_for_model(tmp_path, tokenizer, 1024, 1)


def test_a_stride_above_the_window_would_leave_holes():
    with pytest.raises(ValueError, match="targets between windows would not be scored"):
        SlidingEvalParams(window=16, stride=17, batch_windows=1, chunk=1)


def test_progress_is_silent_on_other_ranks(capsys):
    SlidingScorer(random_model(6), SLIDING, make_world(), Logger(is_main=False)).score_stream(tokens_of(60))
    assert capsys.readouterr().out == ""
