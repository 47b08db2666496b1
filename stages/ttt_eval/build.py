"""Which scorers lie on which: test-time training, the tilt over it, the byte mixture over both."""

from stages.common.bpb import ByteTable
from stages.common.parallel import World
from stages.common.progress import Report
from stages.scoring.evaluate import AskedScorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.train.model import Model
from stages.ttt_eval.bytemix.scorer import MixerScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram.scorer import TiltScorer
from stages.ttt_eval.params import TttEvalParams
from stages.ttt_eval.sgd.scorer import TTTScorer


def scorer_for(
    model: Model,
    sliding: SlidingEvalParams,
    params: TttEvalParams,
    world: World,
    table: ByteTable,
    n_targets: int,
    report: Report | None = None,
) -> AskedScorer:
    """The scorer that the sections ask for; `table`: what the ids of the stream say."""
    scorer: AskedScorer
    if params.kind == "lora":
        scorer = LoRAScorer(model, sliding, params, world, report)
    else:
        scorer = TTTScorer(model, sliding, params, world, n_targets, report)
    if params.tilt_rate:
        scorer = TiltScorer(scorer, params.tilt_rate, table.codes, n_targets)
    if params.mixer_rate:
        scorer = MixerScorer(scorer, params.mixer_rate, table, n_targets, world.device)
    return scorer
