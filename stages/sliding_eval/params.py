"""Parameters of the sliding evaluation."""

from dataclasses import dataclass

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams


@dataclass(frozen=True)
class SlidingEvalParams:
    """The section `sliding_eval`."""

    window: int  # tokens of context and targets of one forward pass
    stride: int  # new targets of each window but the first; every target has window - stride tokens of context or its whole prefix
    batch_windows: int  # windows of one forward pass; changes speed and last digits
    chunk: int  # targets of one row of chunks.tsv

    def __post_init__(self) -> None:
        require_positive(self, "window", "stride", "batch_windows", "chunk")
        if self.stride > self.window:
            reject(
                "stride",
                f"{self.stride} is above the window {self.window}: targets between windows would not be scored",
            )


@dataclass(frozen=True)
class Params:
    """What sliding_eval reads of params.yaml; the model's parameters come from the artifact."""

    parallel: ParallelParams
    sliding_eval: SlidingEvalParams
