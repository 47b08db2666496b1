"""Parameters of the audit: numbers of probed positions, budgets.

params.yaml describes each of them.
"""

from dataclasses import dataclass

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.params import TrainParams
from stages.ttt_eval.params import TttEvalParams


@dataclass(frozen=True)
class AuditParams:
    """Section `audit`. The byte budget is in section `pack`, the training budget in section `train`."""

    perturbations: int
    segment_targets: int
    recomputed_share: float
    chunked_scorer_share: float
    order_documents: int
    call_splits: int
    canary_targets: int
    sampled_targets: int
    canary_bits: float
    distributions: int
    substitutions: int
    decoded_targets: int
    certified_targets: int
    shingle_rate: int
    clean_room: bool
    evaluation_budget_seconds: float

    def __post_init__(self) -> None:
        require_positive(self, "perturbations", "segment_targets", "distributions", "substitutions")
        require_positive(self, "call_splits", "canary_targets", "sampled_targets", "canary_bits")
        require_positive(self, "chunked_scorer_share", "evaluation_budget_seconds")
        require_fraction(self, "recomputed_share", "chunked_scorer_share")

        # 0 switches these off.
        for key in ("decoded_targets", "shingle_rate"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative; 0 switches it off")

        if self.certified_targets < 0:
            reject("certified_targets", f"{self.certified_targets} is negative; 0 is every target")

        # Below these the checks have nothing to compare.
        if self.order_documents < 2:
            reject(
                "order_documents", f"{self.order_documents} is too few: at least 2 can depend on each other"
            )

        if self.substitutions < 4:
            reject(
                "substitutions",
                f"{self.substitutions} is too few: the target, the likeliest id and two drawn ones need 4",
            )

        if self.segment_targets < 8:
            reject(
                "segment_targets",
                f"{self.segment_targets} is too short: a boundary, its neighbours and a future need 8",
            )


@dataclass(frozen=True)
class Params:
    """Sections of params.yaml that audit reads; the model's parameters come from the artifact."""

    parallel: ParallelParams
    train: TrainParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    audit: AuditParams
