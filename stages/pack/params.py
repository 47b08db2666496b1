"""Parameters of the packed artifact."""

from dataclasses import dataclass
from typing import Literal

from stages.common.config import reject, require_positive
from stages.common.parallel import ParallelParams
from stages.pack.low_rank import MAX_RANK
from stages.pack.trellis import STATES
from stages.train.params import ModelParams


@dataclass(frozen=True)
class PackParams:
    """The section `pack`."""

    quantiser: Literal[
        "rate", "sdclip"
    ]  # rate: steps by sensitivity, levels on a trellis (quantise/); sdclip: #1493's fixed widths
    codec: Literal[
        "adaptive", "brotli"
    ]  # of the integers: our arithmetic coder (entropy/level_coder.py), or brotli as in #1493
    states: int  # rate: of the trellis; 1 is a uniform grid; more are better and slower
    rate_weight: float  # rate: of bits against error; 0 takes the nearest levels, and more draws them to zero
    row_weight: (
        float  # rate: exponent of the rows' measured importance; 0 lets all rows of a matrix weigh the same
    )
    matrix_bits: int  # sdclip: of a value of a block matrix, 2 to 8 (#1493: 6)
    embedding_bits: int  # sdclip: of a value of the embedding, 2 to 8 (#1493: 8)
    attention_clip: float  # sdclip: attention's values are clipped so many standard deviations of their row from zero (SDClip, #1394)
    mlp_clip: float  # sdclip: the same for the MLPs' matrices; wider is smaller and coarser (a clip for each class: #1586)
    embedding_clip: float  # sdclip: the same for the embedding
    lqer_rank: int  # of a low-rank correction of the matrices that gain most from one (quantise/lqer.py; #1797); 0 is none
    lqer_tensors: int  # how many matrices are corrected
    awq_groups: int  # sdclip: groups of 64 columns, of the whole model, whose values get 8 bits (AWQ-lite, #1908); 0 is none
    damping: float  # added to the diagonal of each Hessian, as a fraction of the diagonal's mean
    block_columns: int  # sdclip: columns between two lazy updates of the rest of a matrix; changes speed and last digits only
    brotli_quality: int  # 0 to 11
    budget_bytes: int  # of the counted files together: the challenge's cap
    code_reserve_bytes: int  # of the budget, kept for the counted code

    def __post_init__(self) -> None:
        for key in ("matrix_bits", "embedding_bits"):
            if not 2 <= getattr(self, key) <= 8:
                reject(key, f"{getattr(self, key)} is not between 2 and 8")
        if self.states not in STATES:
            reject("states", f"{self.states} is not among {', '.join(map(str, STATES))}")
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
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")
        if not 0 <= self.code_reserve_bytes < self.budget_bytes:
            reject(
                "code_reserve_bytes",
                f"{self.code_reserve_bytes} is not between 0 and the {self.budget_bytes} bytes of the budget",
            )

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
