"""Parameters of the stages bundle and submission.

Both are defined here because the bundle needs one parameter of the submission: the name of the
scorer.
"""

from dataclasses import dataclass
from typing import Literal

from stages.calibrate.params import CalibrateParams
from stages.common.config import reject
from stages.common.parallel import ParallelParams
from stages.pack.params import PackParams
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.params import ModelParams, TrainParams
from stages.ttt_eval.params import TttEvalParams


@dataclass(frozen=True)
class BundleParams:
    """Section `bundle` of params.yaml."""

    brotli_quality: int

    def __post_init__(self) -> None:
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")


@dataclass(frozen=True)
class SubmissionParams:
    """Section `submission` of params.yaml."""

    scorer: Literal["sliding_eval", "ttt_eval"]
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
    """Sections that the stage bundle reads: everything that train_gpt.py runs with, except the seed."""

    parallel: ParallelParams
    model: ModelParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    bundle: BundleParams
    submission: SubmissionParams
