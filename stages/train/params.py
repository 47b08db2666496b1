"""Parameters of the model and of its training; #1493's values stand in presets/record.yaml."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams


@dataclass(frozen=True)
class ModelParams:
    """The section `model`: everything that decides the shapes and the forward pass."""

    vocab_size: int  # V, ids of the tokenizer
    context: int  # T, tokens of a training window and of a scoring window
    width: int  # D
    layers: int  # L, physical blocks
    heads: int  # H, query heads; D / H is the head dimension C
    kv_heads: int  # K, key-value heads
    hidden: int  # F, of the MLP
    attention: Literal[
        "windows", "documents"
    ]  # documents: a token sees its own document only, positions counted from its start
    bos_id: int  # the id that begins a document; read where attention is documents
    rope_dims: int  # leading dimensions of each head that rotate
    rope_base: float
    logit_softcap: float  # logits are softcap * tanh(z / softcap)
    query_gain: float  # initial value of the learned per-head gain on q (QK-gain)
    parallel_from: int  # first block with attention and MLP side by side (#1204)
    loop_first: int  # first block of the looped segment
    loop_last: int  # last block of the looped segment
    loops: int  # extra passes over the segment once looping is on (#1331)
    gate_width: int  # leading dimensions of attention's input that gate its heads; 0 is no gate (#1667)
    smear_width: int  # leading dimensions of an embedding that say how much of the one before it is added; 0 is none (#1667)
    value_tables: (
        int  # tables by token that are added to attention's values, in so many first and as many last blocks
    )
    embedding_std: float  # of the initial embedding

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "context",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "hidden",
            "rope_base",
            "logit_softcap",
        )
        require_positive(self, "query_gain", "embedding_std")
        if self.vocab_size > 65536:
            reject("vocab_size", f"{self.vocab_size} ids do not fit the uint16 tokens of a shard (65536)")
        if self.width % self.heads:
            reject("heads", f"{self.heads} does not divide the width {self.width}")
        if self.heads % self.kv_heads:
            reject("kv_heads", f"{self.kv_heads} does not divide the {self.heads} heads")
        if self.rope_dims % 2 or not 0 <= self.rope_dims <= self.head_dim:
            reject(
                "rope_dims",
                f"{self.rope_dims} is not an even number between 0 and the head dimension {self.head_dim}",
            )
        if not 0 <= self.loop_first <= self.loop_last < self.layers:
            reject(
                "loop_first",
                f"blocks {self.loop_first} to {self.loop_last} are not a segment of {self.layers} layers",
            )
        if self.loops < 0:
            reject("loops", f"{self.loops} is negative")
        for key in ("gate_width", "smear_width"):
            if not 0 <= getattr(self, key) <= self.width:
                reject(key, f"{getattr(self, key)} is not between 0 and the width {self.width}")
        if not 0 <= 2 * self.value_tables <= self.layers:
            reject(
                "value_tables", f"{self.value_tables} is not between 0 and half of the {self.layers} layers"
            )
        if not 0 <= self.bos_id < self.vocab_size:
            reject("bos_id", f"{self.bos_id} is not an id of the vocabulary of {self.vocab_size}")
        if self.parallel_from < 0:
            reject("parallel_from", f"{self.parallel_from} is negative")

    @property
    def head_dim(self) -> int:
        """C, the dimension of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class TrainParams:
    """The section `train`."""

    budget: Literal["steps", "seconds"]  # steps is reproducible, seconds is the challenge's
    steps: int  # optimizer steps when the budget is steps
    seconds: float  # training seconds when the budget is seconds, calibration included
    reserve_seconds: float  # kept of `seconds` for calibration
    batch_tokens: int  # tokens of one optimizer step over all ranks
    micro_batch_tokens: int  # most tokens of one forward pass on one rank
    loop_from: float  # fraction of the budget at which looping is switched on
    warmup_steps: int  # first steps, over which learning rates rise linearly
    warmdown: float  # last fraction of the budget, over which learning rates fall linearly
    min_lr: float  # floor of the learning-rate multiplier
    clip_norm: float  # of the global gradient
    embedding_lr: float
    embedding_weight_decay: float
    matrix_lr: float
    matrix_weight_decay: float
    scalar_lr: float
    scalar_weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    muon_momentum: float
    muon_momentum_start: float
    muon_momentum_warmup_steps: int
    newton_schulz: Literal[
        "fixed", "polar_express"
    ]  # one triple of coefficients for all iterations, or one for each (#1344)
    newton_schulz_steps: int
    ema_decay: float
    logit_scale: float  # factor on the logits, before the softcap, of the averaged model
    checkpoint_every: int  # steps between checkpoints for resuming; 0 is none

    def __post_init__(self) -> None:
        require_positive(
            self,
            "steps",
            "seconds",
            "batch_tokens",
            "micro_batch_tokens",
            "clip_norm",
            "adam_eps",
            "newton_schulz_steps",
        )
        require_positive(self, "logit_scale")
        require_fraction(
            self,
            "loop_from",
            "warmdown",
            "min_lr",
            "adam_beta1",
            "adam_beta2",
            "muon_momentum",
            "muon_momentum_start",
        )
        require_fraction(self, "ema_decay")
        for key in (
            f"{group}_{kind}"
            for group in ("embedding", "matrix", "scalar")
            for kind in ("lr", "weight_decay")
        ):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")
        if not 0 <= self.reserve_seconds < self.seconds:
            reject(
                "reserve_seconds",
                f"{self.reserve_seconds} is not between 0 and the {self.seconds} seconds of the budget",
            )
        for key in ("warmup_steps", "muon_momentum_warmup_steps"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")
        if self.checkpoint_every < 0:
            reject("checkpoint_every", f"{self.checkpoint_every} is negative; 0 switches checkpoints off")
        if self.checkpoint_every and self.budget == "seconds":
            reject(
                "checkpoint_every",
                "a run with budget seconds cannot be resumed, so it keeps no checkpoints; set it to 0",
            )


@dataclass(frozen=True)
class Params:
    """What train reads of params.yaml."""

    seed: int
    parallel: ParallelParams
    model: ModelParams
    train: TrainParams

    def __post_init__(self) -> None:
        if self.seed < 0:
            reject("seed", f"{self.seed} is negative")
        for key in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self.train, key) % self.model.context:
                reject(
                    f"train.{key}",
                    f"{getattr(self.train, key)} is not a multiple of model.context ({self.model.context})",
                )
