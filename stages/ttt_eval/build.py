"""Builds the scorer of either evaluation by the name of its stage."""

from stages.common.scorer import TimedScorer
from stages.scoring.byte_tree import build_byte_trees
from stages.scoring.evaluate import ScorerInputs
from stages.scoring.queries import NetworkScorer
from stages.sliding_eval.params import SlidingEvalParams
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.bytemix.mixer import ByteMixer
from stages.ttt_eval.ensemble import EnsembleScorer
from stages.ttt_eval.lora.scorer import LoRAScorer
from stages.ttt_eval.ngram.tilt import NgramTilt
from stages.ttt_eval.params import TttEvalParams
from stages.ttt_eval.sgd.scorer import TTTScorer

BYTES_PER_TARGET = 4  # roughly; sizes the tables of the byte mixture


def build_scorer(
    name: str, sliding: SlidingEvalParams, params: TttEvalParams, inputs: ScorerInputs
) -> TimedScorer:
    """Build the scorer of the stage `name`, sliding_eval or ttt_eval, as the parameters describe it."""
    if name == "sliding_eval":
        return SlidingScorer(inputs.model, sliding, inputs.world, inputs.logger)

    # The network, and how it is trained on what it has scored.
    network: NetworkScorer
    if params.kind == "lora":
        network = LoRAScorer(inputs.model, sliding, params, inputs.world, inputs.logger)
    else:
        network = TTTScorer(inputs.model, sliding, params, inputs.world, inputs.n_targets, inputs.logger)

    # What is combined with it.
    table = inputs.table
    tilt = None
    mixer = None
    if params.tilt_rate:
        tilt = NgramTilt(table.text_hashes, inputs.n_targets, params.tilt_rate)
    if params.mixer_rate:
        text_bytes = inputs.n_targets * BYTES_PER_TARGET
        mixer = ByteMixer(build_byte_trees(table), text_bytes, params.mixer_rate)
    if tilt is None and mixer is None:
        return network
    return EnsembleScorer(network, table.boundary, inputs.world.device, tilt, mixer)
