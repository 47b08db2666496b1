"""Parameters of test-time training."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams
from stages.sliding_eval.params import SlidingEvalParams


@dataclass(frozen=True)
class LoraParams:
    """The section `ttt_eval.lora`: low-rank adapters, a fresh set for each document."""

    chunk: int  # targets of a document that are scored with one set of adapters, then trained on
    documents: int  # side by side; changes speed and last digits
    adapters: tuple[
        Literal["query", "key", "value", "output", "mlp", "head"], ...
    ]  # the products that have one
    rank: int
    alpha: float  # an adapter adds alpha / rank B A x
    lr: float  # of AdamW, one step a chunk
    beta2: float  # of AdamW, whose beta1 is 0
    eps: float  # of AdamW
    weight_decay: float  # of AdamW, times the rate

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

    kind: Literal[
        "sgd", "lora"
    ]  # sgd: all of the model, on the stream's chunks; lora: adapters, on each document by itself
    confidence: bool  # losses that are trained on are weighed by themselves (loss_weighting.py)
    trained: Literal[
        "all", "matrices", "vectors"
    ]  # sgd: which parameters; matrices are the blocks', vectors all but these and the tables
    chunk: int  # sgd: targets that are scored with one set of weights, then trained on; also of one row of chunks.tsv
    epochs: int  # passes over a chunk
    batch_tokens: int  # tokens of one SGD step over all ranks
    lr: float  # of the first chunk; falls to 0 at the last along half a cosine
    momentum: float  # of SGD; its buffer persists from chunk to chunk
    clip_norm: float  # of the global gradient
    tilt_rate: float  # learning rate of the tilt towards tokens that followed the same context before (ngram/scorer.py); 0 is no tilt
    mixer_rate: float  # learning rate of the byte model mixed in on the decisions of a token (bytemix/scorer.py); 0 is none
    lora: LoraParams

    def __post_init__(self) -> None:
        require_positive(self, "chunk", "batch_tokens", "clip_norm")
        require_fraction(self, "momentum")
        for key in ("epochs", "lr", "tilt_rate", "mixer_rate"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")


@dataclass(frozen=True)
class Params:
    """What ttt_eval reads of params.yaml."""

    parallel: ParallelParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams

    def __post_init__(self) -> None:
        window = self.sliding_eval.window
        if self.ttt_eval.kind == "lora" and self.ttt_eval.lora.chunk > window:
            reject(
                "ttt_eval.lora.chunk", f"{self.ttt_eval.lora.chunk} is above sliding_eval.window ({window})"
            )
        for key in ("chunk", "batch_tokens"):
            if getattr(self.ttt_eval, key) % window:
                reject(
                    f"ttt_eval.{key}",
                    f"{getattr(self.ttt_eval, key)} is not a multiple of sliding_eval.window ({window})",
                )
        if (self.ttt_eval.chunk - window) % self.sliding_eval.stride:
            reject(
                "ttt_eval.chunk",
                f"a boundary at {self.ttt_eval.chunk} would cut a window of stride {self.sliding_eval.stride} in two",
            )
