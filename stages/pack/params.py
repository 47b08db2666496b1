"""Parameters of the packed artifact; #1493's values throughout."""

from dataclasses import dataclass

from stages.config import reject, require_positive
from stages.parallel import ParallelParams
from stages.train.params import ModelParams


@dataclass(frozen=True)
class PackParams:
    """The section `pack`."""

    matrix_bits: int  # of a value of a block matrix, 2 to 8 (#1493: 6)
    embedding_bits: int  # of a value of the embedding, 2 to 8 (#1493: 8)
    matrix_clip: float  # k: values are clipped k standard deviations of their row from zero (SDClip, #1394); wider is smaller and coarser
    embedding_clip: float  # the same for the embedding
    damping: float  # added to the diagonal of each Hessian, as a fraction of the diagonal's mean
    block_columns: int  # columns between two lazy updates of the rest of a matrix; changes speed and last digits only
    brotli_quality: int  # 0 to 11
    budget_bytes: int  # of the counted files together: the challenge's cap
    code_reserve_bytes: int  # of the budget, kept for the counted code

    def __post_init__(self) -> None:
        for key in ("matrix_bits", "embedding_bits"):
            if not 2 <= getattr(self, key) <= 8:
                reject(key, f"{getattr(self, key)} is not between 2 and 8")
        require_positive(self, "matrix_clip", "embedding_clip", "block_columns", "budget_bytes")
        if self.damping < 0:
            reject("damping", f"{self.damping} is negative")
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")
        if not 0 <= self.code_reserve_bytes < self.budget_bytes:
            reject("code_reserve_bytes", f"{self.code_reserve_bytes} is not between 0 and the {self.budget_bytes} bytes of the budget")

    @property
    def model_budget_bytes(self) -> int:
        """What model.bin may take."""
        return self.budget_bytes - self.code_reserve_bytes


@dataclass(frozen=True)
class Params:
    """What pack reads of params.yaml."""

    parallel: ParallelParams
    model: ModelParams
    pack: PackParams
