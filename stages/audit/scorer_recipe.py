"""Scorer factory as plain strings, so that another process can call it (the decoder of B12)."""

import json
from dataclasses import dataclass
from pathlib import Path

from stages.common import config
from stages.common.bpb import byte_table, load_tokenizer
from stages.common.parallel import distributed
from stages.common.scorer import Scorer
from stages.pack.artifact import load_model
from stages.scoring.evaluate import ScorerInputs
from stages.ttt_eval.build import build_scorer
from stages.ttt_eval.params import Params

PIPELINE_FACTORY = "stages.audit.scorer_recipe:build_pipeline_scorer"


@dataclass(frozen=True)
class Recipe:
    """A factory, `module:function`, and the strings that it is called with after the number of targets."""

    factory: str
    words: tuple[str, ...] = ()


def build_pipeline_scorer(
    n_targets: int, name: str, model_file: str, tokenizer_file: str, sections: str
) -> Scorer:
    """Build the pipeline's scorer `name` in a process that has nothing but these strings.

    sections: the parameter sections parallel, sliding_eval and ttt_eval as JSON.
    """
    params = config.build(json.loads(sections), Params)
    with distributed(params.parallel) as world:
        model = load_model(Path(model_file), world)
        table = byte_table(load_tokenizer(Path(tokenizer_file)))
        inputs = ScorerInputs(model, world, table, n_targets)
        return build_scorer(name, params.sliding_eval, params.ttt_eval, inputs)
