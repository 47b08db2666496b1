"""Parameters of the stage bundle: types and bounds. params.yaml describes each of them."""

from dataclasses import dataclass

from stages.calibrate.params import CalibrateParams
from stages.common.config import reject
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.params import ModelParams, TrainParams
from stages.ttt_eval.params import ScorerName, TttEvalParams


@dataclass(frozen=True)
class BundleParams:
    """Section `bundle` of params.yaml."""

    brotli_quality: int

    def __post_init__(self) -> None:
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")


@dataclass(frozen=True)
class Params:
    """Parameters that the stage bundle reads: everything that train_gpt.py runs with, except the seed."""

    scorer: ScorerName
    parallel: ParallelParams
    model: ModelParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    bundle: BundleParams
