"""Parameters of calibration: types and bounds. params.yaml describes each of them."""

from dataclasses import dataclass

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams
from stages.train.params import ModelParams


@dataclass(frozen=True)
class CalibrateParams:
    """The section `calibrate`."""

    tokens: int
    importance_tokens: int
    micro_batch_tokens: int
    revisit_weight: float

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "importance_tokens", "micro_batch_tokens")
        if self.revisit_weight < 0:
            reject("revisit_weight", f"{self.revisit_weight} is negative")
        if self.importance_tokens > self.tokens:
            reject("importance_tokens", f"{self.importance_tokens} is above calibrate.tokens ({self.tokens})")


@dataclass(frozen=True)
class Params:
    """The part of params.yaml that calibrate reads; the seed fixes the order of the training windows."""

    seed: int
    parallel: ParallelParams
    model: ModelParams
    calibrate: CalibrateParams

    def __post_init__(self) -> None:
        tokens = self.calibrate.tokens
        if tokens % self.model.context:
            reject("calibrate.tokens", f"{tokens} is not a multiple of model.context ({self.model.context})")
