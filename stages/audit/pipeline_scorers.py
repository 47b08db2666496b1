"""The pipeline's scorers as the audit sees them: what their processes are started from, and their boundaries.

pipeline_factory.py builds them in those processes.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from stages.audit.params import Params
from stages.audit.precision import Precision
from stages.audit.remote.process import ScorerSource
from stages.audit.sampling import Boundaries
from stages.audit.sandbox.room import gpu_devices
from stages.common.parallel import ParallelParams
from stages.pack.artifact import unpack

MODEL_PARAMETERS = "model"  # key in the metadata of the file of decoded weights
FACTORY = "stages.audit.pipeline_factory:build"
STAGES_FOLDER = Path(__file__).resolve().parents[1]
# Paths in the sandbox.
CODE_FOLDER = "/scorer"
WEIGHTS_FILE = "/artifact/weights.safetensors"
TOKENIZER_FILE = "/data/tokenizer.model"


def scorer_source(
    name: str,
    params: Params,
    parallel: ParallelParams,
    precision: Precision,
    paths: Mapping[str, Path],
    n_targets: int,
) -> ScorerSource:
    """Describe how a process builds the scorer `name`, sliding_eval or ttt_eval, of the packed model.

    parallel, precision: its arithmetic; paths: of `weights` (decode_model) and `tokenizer`.
    """
    # Its parameters.
    sections = {
        "parallel": dataclasses.asdict(dataclasses.replace(parallel, nproc=1)),
        "sliding_eval": dataclasses.asdict(params.sliding_eval),
        "ttt_eval": dataclasses.asdict(params.ttt_eval),
    }

    # All that its process sees.
    visible = {
        f"{CODE_FOLDER}/stages": STAGES_FOLDER,
        WEIGHTS_FILE: paths["weights"].absolute(),
        TOKENIZER_FILE: paths["tokenizer"].absolute(),
    }

    return ScorerSource(
        FACTORY,
        (n_targets, name, WEIGHTS_FILE, TOKENIZER_FILE, json.dumps(sections)),
        visible,
        search_path=(CODE_FOLDER,),
        # Without this, OpenMP has a thread for each core, and those that are not used spin.
        environment={"OMP_NUM_THREADS": str(parallel.threads)},
        devices=gpu_devices() if parallel.device != "cpu" else (),
        precision=precision.name,
    )


def decode_model(model_file: Path, weights_file: Path) -> None:
    """Decode the packed model once for all processes, each of which would have to compile the decoder."""
    params, state = unpack(model_file.read_bytes())
    metadata = {MODEL_PARAMETERS: json.dumps(dataclasses.asdict(params))}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights_file, metadata)


def boundaries_of(name: str, params: Params) -> Boundaries:
    """Periods after which the batches or the weights of the scorer `name` change."""
    trains_in_chunks = name == "ttt_eval" and params.ttt_eval.kind == "sgd"
    return Boundaries(
        window=params.sliding_eval.stride, chunk=params.ttt_eval.chunk if trains_in_chunks else None
    )
