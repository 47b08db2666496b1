"""Parameters of test-time training."""

from dataclasses import dataclass

from stages.config import reject, require_fraction, require_positive
from stages.parallel import ParallelParams
from stages.sliding_eval.params import SlidingEvalParams


@dataclass(frozen=True)
class TttEvalParams:
    """The section `ttt_eval`; window and stride are sliding_eval's."""

    chunk: int  # targets that are scored with one set of weights, then trained on
    epochs: int  # passes over a chunk
    batch_tokens: int  # tokens of one SGD step over all ranks
    lr: float  # of the first chunk; falls to 0 at the last along half a cosine
    momentum: float  # of SGD; its buffer persists from chunk to chunk
    clip_norm: float  # of the global gradient
    tilt_rate: float  # learning rate of the tilt towards tokens that followed the same context before (tilt.py); 0 is no tilt

    def __post_init__(self) -> None:
        require_positive(self, "chunk", "batch_tokens", "clip_norm")
        require_fraction(self, "momentum")
        for key in ("epochs", "lr", "tilt_rate"):
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
        for key in ("chunk", "batch_tokens"):
            if getattr(self.ttt_eval, key) % window:
                reject(f"ttt_eval.{key}", f"{getattr(self.ttt_eval, key)} is not a multiple of sliding_eval.window ({window})")
        if (self.ttt_eval.chunk - window) % self.sliding_eval.stride:
            reject("ttt_eval.chunk", f"a boundary at {self.ttt_eval.chunk} would cut a window of stride {self.sliding_eval.stride} in two")
