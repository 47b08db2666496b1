"""Parameters of test-time training; params.yaml describes each."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams
from stages.sliding_eval.params import SlidingEvalParams

# The parameter `scorer`: the stage whose ledger gives val_bpb.
ScorerName = Literal["sliding_eval", "ttt_eval"]


@dataclass(frozen=True)
class LoraParams:
    """The section `ttt_eval.lora`."""

    chunk: int
    documents: int
    adapters: tuple[Literal["query", "key", "value", "output", "mlp", "head"], ...]
    rank: int
    alpha: float
    lr: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        require_positive(self, "chunk", "documents", "rank", "alpha", "eps")
        require_fraction(self, "beta2")
        for key in ("lr", "weight_decay"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")
        if self.beta2 == 1:
            reject("beta2", "1 would never look at a gradient; give less")
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            reject("adapters", f"{list(self.adapters)} is empty or names one twice")


@dataclass(frozen=True)
class TttEvalParams:
    """The section `ttt_eval`; window and stride are sliding_eval's."""

    kind: Literal["sgd", "lora"]
    weight_by_surprise: bool
    trained: Literal["all", "matrices", "vectors"]
    chunk: int
    epochs: int
    batch_tokens: int
    lr: float
    momentum: float
    clip_norm: float
    tilt_rate: float
    mixer_rate: float
    lora: LoraParams

    def __post_init__(self) -> None:
        require_positive(self, "chunk", "batch_tokens", "clip_norm")
        require_fraction(self, "momentum")
        for key in ("epochs", "lr", "tilt_rate", "mixer_rate"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")


@dataclass(frozen=True)
class Params:
    """The sections of params.yaml that ttt_eval reads."""

    parallel: ParallelParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams

    def __post_init__(self) -> None:
        ttt = self.ttt_eval
        window = self.sliding_eval.window
        stride = self.sliding_eval.stride
        if ttt.kind == "lora" and ttt.lora.chunk > window:
            reject("ttt_eval.lora.chunk", f"{ttt.lora.chunk} is above sliding_eval.window ({window})")
        for key, value in (("chunk", ttt.chunk), ("batch_tokens", ttt.batch_tokens)):
            if value % window:
                reject(f"ttt_eval.{key}", f"{value} is not a multiple of sliding_eval.window ({window})")
        if (ttt.chunk - window) % stride:
            reject(
                "ttt_eval.chunk", f"a boundary at {ttt.chunk} would cut a window of stride {stride} in two"
            )
