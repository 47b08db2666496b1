"""Parameters of pack: quantisation, codec and byte budget."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams
from stages.pack.low_rank import MAX_RANK
from stages.pack.trellis import STATE_COUNTS
from stages.train.params import ModelParams


@dataclass(frozen=True)
class PackParams:
    """The section `pack`; params.yaml describes each key."""

    quantiser: Literal["rate", "sdclip"]
    codec: Literal["adaptive", "brotli"]
    states: int  # S, one of STATE_COUNTS
    rate_weight: float
    row_weight: float
    matrix_bits: int
    embedding_bits: int
    attention_clip: float
    mlp_clip: float
    embedding_clip: float
    lqer_rank: int  # K
    lqer_tensors: int
    awq_groups: int
    damping: float
    block_columns: int
    brotli_quality: int
    budget_bytes: int
    code_reserve_bytes: int

    def __post_init__(self) -> None:
        # Quantisation.
        for key in ("matrix_bits", "embedding_bits"):
            if not 2 <= getattr(self, key) <= 8:
                reject(key, f"{getattr(self, key)} is not between 2 and 8")
        if self.states not in STATE_COUNTS:
            reject("states", f"{self.states} is not among {', '.join(map(str, STATE_COUNTS))}")
        for key in ("rate_weight", "row_weight", "awq_groups", "damping"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative")
        if not 0 <= self.lqer_rank <= MAX_RANK:
            reject("lqer_rank", f"{self.lqer_rank} is not between 0 and {MAX_RANK}")

        require_positive(
            self,
            "lqer_tensors",
            "attention_clip",
            "mlp_clip",
            "embedding_clip",
            "block_columns",
            "budget_bytes",
        )

        # Codec and budget.
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")
        if not 0 <= self.code_reserve_bytes < self.budget_bytes:
            reject(
                "code_reserve_bytes",
                f"{self.code_reserve_bytes} is not between 0 and the {self.budget_bytes} bytes of the budget",
            )

    @property
    def model_budget_bytes(self) -> int:
        """Largest allowed size of model.bin."""
        return self.budget_bytes - self.code_reserve_bytes


@dataclass(frozen=True)
class Params:
    """The sections of params.yaml that pack reads."""

    parallel: ParallelParams
    model: ModelParams
    pack: PackParams
