"""Parameters of the bundle, and those of the submission, of which the bundle needs the name of the scorer."""

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
    """The section `bundle`."""

    brotli_quality: int  # 0 to 11; 11 is what the records use (techniques: 15,443 bytes against LZMA's 16,700 for #1493's code)

    def __post_init__(self) -> None:
        if not 0 <= self.brotli_quality <= 11:
            reject("brotli_quality", f"{self.brotli_quality} is not between 0 and 11")


@dataclass(frozen=True)
class SubmissionParams:
    """The section `submission`: what the challenge asks of the author, and which score is claimed."""

    scorer: Literal[
        "sliding_eval", "ttt_eval"
    ]  # whose ledger is val_bpb, named before the run and never chosen after it
    author: str  # as it shall appear on the leaderboard
    github_id: str  # account that opens the pull request
    name: str  # of the submission, one line
    track: str  # the challenge's: 10min_16mb for records, non-record-16mb for the rest
    blurb: str  # what is new, in a sentence or two

    def __post_init__(self) -> None:
        for key in ("author", "github_id", "name", "track", "blurb"):
            if not getattr(self, key).strip():
                reject(key, "is empty; the challenge asks for it")


@dataclass(frozen=True)
class Params:
    """What bundle reads of params.yaml: all that train_gpt.py runs with, and not the seed."""

    parallel: ParallelParams
    model: ModelParams
    train: TrainParams
    calibrate: CalibrateParams
    pack: PackParams
    sliding_eval: SlidingEvalParams
    ttt_eval: TttEvalParams
    bundle: BundleParams
    submission: SubmissionParams
