"""Parameters of the model and of its training: types and bounds. params.yaml describes each of them."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams

MAX_VOCAB_SIZE = 65536  # ids that fit the uint16 tokens of a shard


@dataclass(frozen=True)
class ModelParams:
    """The section `model`: everything that decides the shapes and the forward pass."""

    vocab_size: int  # V
    context: int  # T
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    hidden: int  # F
    attention: Literal["windows", "documents"]
    bos_id: int
    rope_dims: int  # 2R
    rope_base: float
    logit_softcap: float
    query_gain: float
    parallel_from: int
    loop_first: int
    loop_last: int
    loops: int
    gate_width: int
    smear_width: int
    value_tables: int
    embedding_std: float

    def __post_init__(self) -> None:
        # Sizes.
        require_positive(self, "vocab_size", "context", "width", "layers", "heads", "kv_heads", "hidden")
        require_positive(self, "rope_base", "logit_softcap", "query_gain", "embedding_std")
        if self.vocab_size > MAX_VOCAB_SIZE:
            reject(
                "vocab_size",
                f"{self.vocab_size} ids do not fit the uint16 tokens of a shard ({MAX_VOCAB_SIZE})",
            )
        if not 0 <= self.bos_id < self.vocab_size:
            reject("bos_id", f"{self.bos_id} is not an id of the vocabulary of {self.vocab_size}")

        # Heads.
        if self.width % self.heads:
            reject("heads", f"{self.heads} does not divide the width {self.width}")
        if self.heads % self.kv_heads:
            reject("kv_heads", f"{self.kv_heads} does not divide the {self.heads} heads")
        if self.rope_dims % 2 or not 0 <= self.rope_dims <= self.head_dim:
            limits = f"an even number between 0 and the head dimension {self.head_dim}"
            reject("rope_dims", f"{self.rope_dims} is not {limits}")

        # Order of the blocks.
        if not 0 <= self.loop_first <= self.loop_last < self.layers:
            segment = f"blocks {self.loop_first} to {self.loop_last}"
            reject("loop_first", f"{segment} are not a segment of {self.layers} layers")
        if self.loops < 0:
            reject("loops", f"{self.loops} is negative")
        if self.parallel_from < 0:
            reject("parallel_from", f"{self.parallel_from} is negative")

        # Optional parts.
        for key in ("gate_width", "smear_width"):
            if not 0 <= getattr(self, key) <= self.width:
                reject(key, f"{getattr(self, key)} is not between 0 and the width {self.width}")
        if not 0 <= 2 * self.value_tables <= self.layers:
            limits = f"between 0 and half of the {self.layers} layers"
            reject("value_tables", f"{self.value_tables} is not {limits}")

    @property
    def head_dim(self) -> int:
        """C, the dimension of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class TrainParams:
    """The section `train`."""

    budget: Literal["steps", "seconds"]
    steps: int
    seconds: float
    reserve_seconds: float
    batch_tokens: int
    micro_batch_tokens: int
    loop_from: float
    warmup_steps: int
    warmdown: float
    min_lr: float
    clip_norm: float
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
    newton_schulz: Literal["fixed", "polar_express"]
    newton_schulz_steps: int
    ema_decay: float
    logit_scale: float
    checkpoint_every: int

    def __post_init__(self) -> None:
        # Budget and batch.
        require_positive(self, "steps", "seconds", "batch_tokens", "micro_batch_tokens")
        if not 0 <= self.reserve_seconds < self.seconds:
            limits = f"between 0 and the {self.seconds} seconds of the budget"
            reject("reserve_seconds", f"{self.reserve_seconds} is not {limits}")

        # Schedule.
        require_fraction(self, "loop_from", "warmdown", "min_lr")
        for key in ("warmup_steps", "muon_momentum_warmup_steps"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")

        # Optimizer.
        require_positive(self, "clip_norm", "adam_eps", "newton_schulz_steps", "logit_scale")
        require_fraction(
            self, "adam_beta1", "adam_beta2", "muon_momentum", "muon_momentum_start", "ema_decay"
        )
        for group in ("embedding", "matrix", "scalar"):
            for key in (f"{group}_lr", f"{group}_weight_decay"):
                if getattr(self, key) < 0:
                    reject(key, f"{getattr(self, key)} is negative")

        # Checkpoints.
        if self.checkpoint_every < 0:
            reject("checkpoint_every", f"{self.checkpoint_every} is negative; 0 switches checkpoints off")
        if self.checkpoint_every and self.budget == "seconds":
            reject(
                "checkpoint_every",
                "a run with budget seconds cannot be resumed, so it keeps no checkpoints; set it to 0",
            )


@dataclass(frozen=True)
class Params:
    """The part of params.yaml that train reads."""

    seed: int
    parallel: ParallelParams
    model: ModelParams
    train: TrainParams

    def __post_init__(self) -> None:
        if self.seed < 0:
            reject("seed", f"{self.seed} is negative")
        for key in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self.train, key)
            if tokens % self.model.context:
                reject(f"train.{key}", f"{tokens} is not a multiple of model.context ({self.model.context})")
