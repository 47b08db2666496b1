"""Parameters of the audit: how many positions it probes, how closely two numbers must agree, what is over budget."""

from dataclasses import dataclass

from stages.common.config import reject, require_fraction, require_positive
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.params import TrainParams
from stages.ttt_eval.params import TttEvalParams


@dataclass(frozen=True)
class AuditParams:
    """The section `audit`; the byte budget is pack's and the training budget train's, so that each number has one owner."""

    perturbations: int  # positions t after which the future is replaced (B1)
    segment_targets: (
        int  # targets scored around each of them: how far beyond t a leak within the segment is seen
    )
    recomputed_share: float  # of the targets, scored again by a scorer that has not seen what follows, and held against the ledger
    trained_share: (
        float  # of the stream that a scorer with chunks is led over, since each chunk costs a training
    )
    graph_documents: int  # short documents scored in one call to see which moves which (B1c)
    handed_stretches: int  # scored in one call and in several, looked at and not (B5, B13)
    canary_targets: int  # tokens of each stretch of known law (B7, B9)
    sampled_targets: int  # tokens of the one drawn from the scorer's own predictions (B8)
    canary_bits: float  # k: what a lawful scorer wins on a canary with probability 2^-k at most
    distributions: int  # positions at which predict() is read, half of them in the last quarter (B2, B3)
    substitutions: (
        int  # ids put in the place of x_t at each of those; a vocabulary no larger is put there whole
    )
    decoded_targets: int  # of the stream, coded and decoded by another process (B12); 0: none
    shingle_rate: int  # one in so many 50-byte passages of val is looked for in train (B15); 0: none
    clean_room: bool  # whether the counted files score once more, in a room of their own (B14): as long as both evaluations
    loss_tolerance: float  # nats, between two ways to compute one loss; float32 sums in batches of other shapes differ by 1e-5
    mean_tolerance: float  # nats, between the means of two such sets: a small gain at every target shows here
    bfloat16_loss_tolerance: (
        float  # the same where the ledger was written with bfloat16 activations, which the audit does not use
    )
    bfloat16_mean_tolerance: float
    sum_tolerance: float  # of the log of the sum of all probabilities, which must be 0 (below is tolerated)
    evaluation_budget_seconds: float  # of one evaluation process, from its start (challenge: 600)

    def __post_init__(self) -> None:
        require_positive(
            self,
            "perturbations",
            "segment_targets",
            "distributions",
            "substitutions",
            "evaluation_budget_seconds",
        )
        require_positive(
            self, "trained_share", "handed_stretches", "canary_targets", "sampled_targets", "canary_bits"
        )
        require_positive(self, "loss_tolerance", "mean_tolerance", "sum_tolerance")
        require_positive(self, "bfloat16_loss_tolerance", "bfloat16_mean_tolerance")
        require_fraction(self, "recomputed_share", "trained_share")
        for key in ("decoded_targets", "shingle_rate"):
            if getattr(self, key) < 0:
                reject(key, f"{getattr(self, key)} is negative; 0 switches it off")
        if self.graph_documents < 2:
            reject("graph_documents", f"{self.graph_documents} documents cannot move each other; at least 2")
        if self.substitutions < 4:
            reject(
                "substitutions",
                f"{self.substitutions} is too few: the target, the likeliest id and two drawn ones need 4",
            )
        if self.segment_targets < 8:
            reject(
                "segment_targets",
                f"{self.segment_targets} is too short: an edge, its neighbours and a future need 8",
            )


@dataclass(frozen=True)
class Params:
    """What audit reads of params.yaml; the model's parameters come from the artifact."""

    parallel: ParallelParams
    train: TrainParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    audit: AuditParams
