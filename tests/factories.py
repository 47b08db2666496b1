"""Small parameters, shards and models that several test files need."""

import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.audit.params import AuditParams
from stages.common import shards
from stages.common.bpb import ByteTable
from stages.common.parallel import ParallelParams, World
from stages.common.scorer import Scorer
from stages.scoring.evaluate import ScorerInputs
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.loop import TrainResult
from stages.train.model import Model, initialise_
from stages.train.params import ModelParams, Params, TrainParams
from stages.ttt_eval.params import LoraParams, TttEvalParams

PARALLEL = ParallelParams(
    nproc=1, threads=1, device="cpu", dtype="auto", deterministic=True, compile=False, kernels=False
)
TINY = ModelParams(
    vocab_size=37,
    context=16,
    width=24,
    layers=5,
    heads=4,
    kv_heads=2,
    hidden=40,
    attention="windows",
    bos_id=1,
    rope_dims=4,
    rope_base=10000.0,
    logit_softcap=30.0,
    query_gain=5.25,
    parallel_from=3,
    loop_first=1,
    loop_last=2,
    loops=2,
    gate_width=5,
    smear_width=6,
    value_tables=2,
    embedding_std=0.005,
)
TRAIN = TrainParams(
    budget="steps",
    steps=8,
    seconds=60.0,
    reserve_seconds=1.0,
    batch_tokens=64,
    micro_batch_tokens=32,
    loop_from=0.35,
    warmup_steps=0,
    warmdown=0.72,
    min_lr=0.0,
    clip_norm=0.3,
    embedding_lr=0.03,
    embedding_weight_decay=0.085,
    matrix_lr=0.022,
    matrix_weight_decay=0.095,
    scalar_lr=0.02,
    scalar_weight_decay=0.02,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_eps=1e-8,
    muon_momentum=0.99,
    muon_momentum_start=0.92,
    muon_momentum_warmup_steps=1500,
    newton_schulz="fixed",
    newton_schulz_steps=5,
    ema_decay=0.9,
    logit_scale=1.0,
    checkpoint_every=0,
)

LORA = LoraParams(
    chunk=5,
    documents=3,
    adapters=("query", "key", "value", "output", "mlp", "head"),
    rank=3,
    alpha=6.0,
    lr=0.02,
    beta2=0.99,
    eps=1e-3,  # AdamW without momentum divides by the gradient itself: what is rounding noise must stay small
    weight_decay=0.5,
)
TTT = TttEvalParams(
    kind="sgd",
    weight_by_surprise=False,
    trained="all",
    chunk=32,
    epochs=2,
    batch_tokens=16,
    lr=0.05,
    momentum=0.9,
    clip_norm=1.0,
    tilt_rate=0.0,
    mixer_rate=0.0,
    lora=LORA,
)
AUDIT = AuditParams(
    perturbations=21,
    segment_targets=64,
    recomputed_share=0.1,
    chunked_scorer_share=1.0,
    order_documents=5,
    call_splits=3,
    canary_targets=256,
    sampled_targets=256,
    canary_bits=64.0,
    distributions=16,
    substitutions=16,
    decoded_targets=0,
    certified_targets=0,
    shingle_rate=0,
    clean_room=False,
    evaluation_budget_seconds=600.0,
)
SLIDING = SlidingEvalParams(window=16, stride=4, batch_windows=3, chunk=32)


def table(vocab_size: int = TINY.vocab_size) -> ByteTable:
    """The byte table of a made-up tokenizer.

    Four ids emit nothing and one a space; the others are short words, some of which occur twice.
    """
    texts = [b""] * 5
    for i in range(vocab_size - 5):
        texts.append(bytes(97 + (i >> shift) % 3 for shift in range(0, 2 * (i % 4) + 1, 2)))
    ids = np.arange(vocab_size)
    return ByteTable(tuple(texts), (ids % 3 == 1) & (ids > 3), ids < 4, 1)


def two_byte_table() -> ByteTable:
    """A table in which every id of the tiny model emits the same two bytes."""
    flags = np.zeros(TINY.vocab_size, dtype=bool)
    return ByteTable((b"ab",) * TINY.vocab_size, flags, flags.copy(), bos=1)


def make_world(rank: int = 0, size: int = 1) -> World:
    """The world of one rank on the CPU, without a process group."""
    return World(
        rank,
        size,
        torch.device("cpu"),
        torch.float32,
        compile=False,
        host_group=None,
        is_local_rank_zero=rank == 0,
    )


def add_between_threads(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Let `World.sum_` add over ranks that are threads of this process."""
    meeting = threading.Barrier(ranks)
    given = [torch.empty(0)] * ranks

    def sum_(self: World, tensor: torch.Tensor) -> torch.Tensor:
        given[self.rank] = tensor.clone()
        meeting.wait(60)
        tensor.copy_(sum(given[1:], given[0]))
        meeting.wait(60)
        return tensor

    monkeypatch.setattr(World, "sum_", sum_)


def scorer_inputs(model: Model, n_targets: int) -> ScorerInputs:
    """Inputs of `build_scorer` for a stream of the ids of `table`."""
    return ScorerInputs(model, make_world(), table(model.params.vocab_size), n_targets)


def params(seed: int = 42, **train: Any) -> Params:
    """Parameters of the stage train for the tiny model, with changes to its section."""
    return Params(seed, PARALLEL, TINY, replace(TRAIN, **train))


def random_model(seed: int = 0, model_params: ModelParams = TINY) -> Model:
    """A model whose every parameter is random, so that nothing is hidden by a zero or a one."""
    model = Model(model_params)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def write_shards(
    folder: Path, lengths: tuple[int, ...] = (700, 900), vocab: int = TINY.vocab_size, seed: int = 0
) -> Path:
    """Write shards of a stream that can be learnt: a noisy cycle over the ids, with BOS (1) every 50."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.PCG64(seed))
    for number, length in enumerate(lengths):
        tokens = (np.arange(length) * 3 + generator.integers(0, 3, length)) % (vocab - 4) + 4
        tokens[::50] = 1
        shards.write(folder / f"train_{number:06d}.bin", tokens.astype(np.uint16))
    return folder


def assert_trained_alike(folder: Path, alone: TrainResult, ranks: int) -> None:
    """Check that `ranks` ranks of the stage train gave one process's result, up to the order of sums."""
    np.testing.assert_allclose(np.loadtxt(folder / "loss.tsv", skiprows=1)[:, 1], alone.losses, atol=1e-4)
    state = load_file(folder / "model.safetensors")
    assert state.keys() == alone.state.keys()
    for name, tensor in alone.state.items():
        torch.testing.assert_close(state[name], tensor, atol=2e-3, rtol=0)
    assert json.loads((folder / "timing.json").read_text())["ranks"] == ranks


def assert_forks_are_independent(
    make: Callable[[Model], Scorer], tokens: np.ndarray, observed: Sequence[int] = ()
) -> None:
    """Check that a fork's work changes neither the scorer it was forked from nor the model given to that."""
    cut = 40
    model = random_model(6)
    before = copy.deepcopy(model.state_dict())
    scorer = make(model)
    scorer.score_stream(tokens[:cut])
    fork = scorer.fork()
    for token in observed:
        fork.observe(token)
    fork.score_stream(np.full(60, 9, dtype=np.uint16))

    without_fork = make(random_model(6))
    without_fork.score_stream(tokens[:cut])
    np.testing.assert_array_equal(scorer.score_stream(tokens[cut:]), without_fork.score_stream(tokens[cut:]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def assert_pieces_and_predictions_agree(
    make: Callable[[], Scorer], tokens: np.ndarray, cuts: Sequence[int]
) -> None:
    """Check that a stream in pieces, and 80 targets by predict(), score as the whole stream does."""
    whole = make().score_stream(tokens)
    in_pieces = make()
    pieces = np.concatenate([in_pieces.score_stream(part) for part in np.split(tokens, cuts)])
    np.testing.assert_allclose(pieces, whole, atol=2e-4)

    one_by_one = make()
    one_by_one.observe(int(tokens[0]))
    for target in range(80):
        distribution = one_by_one.predict()
        assert abs(np.logaddexp.reduce(distribution)) < 1e-12
        assert abs(distribution[tokens[target + 1]] + whole[target]) < 2e-4
        one_by_one.observe(int(tokens[target + 1]))
    np.testing.assert_allclose(one_by_one.score_stream(tokens[81:]), whole[80:], atol=2e-4)
