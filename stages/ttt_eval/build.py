"""Builds the scorer of ttt_eval: test-time training, the tilt on top of it, the byte mixer on top of both."""

from stages.common.bpb import ByteTable
from stages.common.parallel import World
from stages.common.progress import Logger
from stages.scoring.evaluate import QueryableScorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Model
from stages.ttt_eval.bytemix.scorer import MixerScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram.scorer import TiltScorer
from stages.ttt_eval.params import TttEvalParams
from stages.ttt_eval.sgd.scorer import TTTScorer


def build_scorer(
    model: Model,
    sliding: SlidingEvalParams,
    params: TttEvalParams,
    world: World,
    table: ByteTable,
    n_targets: int,
    logger: Logger | None = None,
) -> QueryableScorer:
    """Build the scorer that the parameters describe; `table` has the text of the stream's ids."""
    scorer: QueryableScorer
    if params.kind == "lora":
        scorer = LoRAScorer(model, sliding, params, world, logger)
    else:
        scorer = TTTScorer(model, sliding, params, world, n_targets, logger)
    if params.tilt_rate:
        scorer = TiltScorer(scorer, params.tilt_rate, table.text_hashes, n_targets)
    if params.mixer_rate:
        scorer = MixerScorer(scorer, params.mixer_rate, table, n_targets, world.device)
    return scorer
