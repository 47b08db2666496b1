"""How a process of its own makes a scorer: by a name that can be written down."""

import json
from dataclasses import dataclass
from pathlib import Path

from stages.common import config
from stages.common.bpb import byte_table, load_tokenizer
from stages.common.parallel import world
from stages.common.scorer import Scorer
from stages.pack.artifact import load_model
from stages.sliding_eval.scorer import SlidingScorer
from stages.ttt_eval.build import scorer_for
from stages.ttt_eval.params import Params

OWN = "stages.audit.scorer_recipe:own_scorer"


@dataclass(frozen=True)
class Recipe:
    """`factory` is `module:function`, which is called with the number of targets and these words."""

    factory: str
    words: tuple[str, ...] = ()


def own_scorer(n_targets: int, name: str, model_file: str, tokenizer_file: str, sections: str) -> Scorer:
    """The pipeline's scorer of that name, for a process of its own; `sections`: parallel, sliding_eval and ttt_eval as JSON."""
    params = config.build(json.loads(sections), Params)
    with world(params.parallel) as here:
        model = load_model(Path(model_file), here)
        if name == "sliding_eval":
            return SlidingScorer(model, params.sliding_eval, here)
        table = byte_table(load_tokenizer(Path(tokenizer_file)))
        return scorer_for(model, params.sliding_eval, params.ttt_eval, here, table, n_targets)
