"""Parameters of calibration."""

from dataclasses import dataclass

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams
from stages.train.params import ModelParams


@dataclass(frozen=True)
class CalibrateParams:
    """The section `calibrate`."""

    tokens: int  # training tokens whose activations are measured, over all ranks; the first ones of the training order
    importance_tokens: (
        int  # of these, tokens whose gradients say how much each row matters; rounded up to whole passes
    )
    micro_batch_tokens: int  # most tokens of one forward pass
    revisit_weight: float  # of the second and later visits of a looped block in the Hessians of its matrices; 1 counts every visit alike

    def __post_init__(self) -> None:
        require_positive(self, "tokens", "importance_tokens", "micro_batch_tokens")
        if self.revisit_weight < 0:
            reject("revisit_weight", f"{self.revisit_weight} is negative")
        if self.importance_tokens > self.tokens:
            reject("importance_tokens", f"{self.importance_tokens} is above calibrate.tokens ({self.tokens})")


@dataclass(frozen=True)
class Params:
    """What calibrate reads of params.yaml; the seed fixes which windows are the first ones."""

    seed: int
    parallel: ParallelParams
    model: ModelParams
    calibrate: CalibrateParams

    def __post_init__(self) -> None:
        if self.calibrate.tokens % self.model.context:
            reject(
                "calibrate.tokens",
                f"{self.calibrate.tokens} is not a multiple of model.context ({self.model.context})",
            )
