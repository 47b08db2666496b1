"""Parameters of the stage submission, which reads all of params.yaml: types and bounds."""

from dataclasses import dataclass

from stages.audit.params import AuditParams
from stages.bundle.params import BundleParams
from stages.calibrate.params import CalibrateParams
from stages.common.config import reject
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.tokenize.params import TokenizeParams
from stages.train.params import ModelParams, TrainParams
from stages.ttt_eval.params import ScorerName, TttEvalParams


@dataclass(frozen=True)
class SubmissionParams:
    """The section `submission`."""

    author: str
    github_id: str
    name: str
    track: str
    blurb: str

    def __post_init__(self) -> None:
        for key in ("author", "github_id", "name", "track", "blurb"):
            if not getattr(self, key).strip():
                reject(key, "is empty; the challenge asks for it")


@dataclass(frozen=True)
class Params:
    """All sections: a submission states every effective parameter."""

    seed: int
    scorer: ScorerName
    parallel: ParallelParams
    model: ModelParams
    tokenize: TokenizeParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    bundle: BundleParams
    audit: AuditParams
    submission: SubmissionParams
