"""Parameters of the stage submission: all of params.yaml.

The section `submission` is defined in stages/bundle/params.py, since the bundle needs its scorer's
name.
"""

from dataclasses import dataclass

from stages.audit.params import AuditParams
from stages.bundle.params import BundleParams, SubmissionParams
from stages.calibrate.params import CalibrateParams
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.tokenize.params import TokenizeParams
from stages.train.params import ModelParams, TrainParams
from stages.ttt_eval.params import TttEvalParams


@dataclass(frozen=True)
class Params:
    """All sections: a submission states every effective parameter."""

    seed: int
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
