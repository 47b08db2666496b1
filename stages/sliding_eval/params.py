"""Parameters of the sliding evaluation; params.yaml describes them."""

from dataclasses import dataclass

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams


@dataclass(frozen=True)
class SlidingEvalParams:
    """The section `sliding_eval`."""

    window: int  # W
    stride: int  # S
    batch_windows: int  # B
    chunk: int

    def __post_init__(self) -> None:
        require_positive(self, "window", "stride", "batch_windows", "chunk")
        if self.stride > self.window:
            reject(
                "stride",
                f"{self.stride} is above the window {self.window}:"
                " targets between windows would not be scored",
            )


@dataclass(frozen=True)
class Params:
    """The sections that sliding_eval reads; the model's parameters come from the artifact."""

    parallel: ParallelParams
    sliding_eval: SlidingEvalParams
