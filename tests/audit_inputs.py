"""Small artifacts of all stages before the audit, and the options that point the audit at them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.calibrate.hessians import hessian_name
from stages.common import bpb, shards
from stages.common.progress import Logger
from stages.common.stage import launch
from stages.pack import artifact
from stages.pack.params import PackParams
from stages.pack.quantise import tensor_kinds
from stages.sliding_eval import stage as sliding_stage
from stages.tokenize import duplicates, tokenizer
from stages.ttt_eval import stage as ttt_stage
from tests import factories, pack_inputs
from tests.zoo.harness import PARAMS

SECTIONS: dict[str, Any] = {
    "parallel": dataclasses.asdict(factories.PARALLEL),
    "train": dataclasses.asdict(factories.TRAIN),
    "pack": dataclasses.asdict(dataclasses.replace(pack_inputs.PACK, lqer_tensors=3, brotli_quality=4)),
    "sliding_eval": {"window": 16, "stride": 4, "batch_windows": 8, "chunk": 128},
    "ttt_eval": dataclasses.asdict(
        dataclasses.replace(factories.TTT, chunk=256, epochs=1, batch_tokens=64, lr=0.01)
    ),
    "audit": dataclasses.asdict(
        dataclasses.replace(
            PARAMS,
            perturbations=12,
            segment_targets=24,
            recomputed_share=0.05,
            distributions=4,
            substitutions=6,
            canary_targets=24,
            sampled_targets=4,
            call_splits=1,
            order_documents=3,
            certified_targets=24,
        )
    ),
}


def write_artifacts(folder: Path, sections: dict[str, Any]) -> list[str]:
    """Write the artifacts to `folder`; returns the audit's options."""
    for name in ("train", "val", "sliding", "ttt"):
        (folder / name).mkdir(parents=True)
    _write_shards(folder)
    _write_model(folder)
    (folder / "train_gpt.py").write_text("# the counted code\n")
    for name in ("train_timing", "calibrate_timing"):
        (folder / f"{name}.json").write_text(json.dumps({"training_seconds": 5.0}))

    # The ledgers, by the evaluation stages themselves.
    val = f"--val={folder / 'val'}"
    inputs = [f"--model={folder / 'model.bin'}", f"--tokenizer={folder / 'tokenizer.model'}"]
    scored = [*inputs, val]
    sliding = folder / "sliding"
    launch(sliding_stage.STAGE, sliding_stage.main, [*scored, f"--output={sliding}"], sections)
    scored.append(f"--sliding={sliding / 'nll.npy'}")
    launch(ttt_stage.STAGE, ttt_stage.main, [*scored, f"--output={folder / 'ttt'}"], sections)

    return [
        *inputs,
        val,
        f"--train={folder / 'train'}",
        f"--code={folder / 'train_gpt.py'}",
        f"--documents={folder / 'documents.u64'}",
        f"--manifest={folder / 'manifest.json'}",
        f"--sliding={sliding}",
        f"--ttt={folder / 'ttt'}",
        f"--train-timing={folder / 'train_timing.json'}",
        f"--calibrate-timing={folder / 'calibrate_timing.json'}",
    ]


def _write_shards(folder: Path) -> None:
    """A tokenizer, shards of both sides, their manifest and the hashes of their documents."""
    texts = [
        f"Document {i} says that {i * i} is the square of {i}, and nothing more.\n" * 2 for i in range(40)
    ]
    (folder / "tokenizer.model").write_bytes(tokenizer.train(texts, 320, 1))
    processor = bpb.load_tokenizer(folder / "tokenizer.model")
    documents = [np.array([processor.bos_id(), *processor.encode(text)], dtype=np.uint16) for text in texts]
    sides = {"train": documents[:25], "val": documents[25:]}

    listed = {}
    hashes = []
    for side, held in sides.items():
        path = folder / side / f"{side}_000000.bin"
        shards.write(path, np.concatenate(held))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        listed[f"{side}/{side}_000000.bin"] = {"documents": len(held), "sha256": digest}
        of_documents = [duplicates.document_hash(document) for document in held]
        hashes.append(np.sort(np.array(of_documents, dtype=np.uint64)))
    (folder / "manifest.json").write_text(json.dumps({"shards": listed}))
    duplicates.write_hashes(folder / "documents.u64", *hashes)


def _write_model(folder: Path) -> None:
    """A random model, packed with identity matrices as Hessians."""
    model_params = dataclasses.replace(factories.TINY, vocab_size=320)
    model = factories.random_model(3, model_params)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    hessians = {}
    for name, tensor in state.items():
        if tensor_kinds.kind_of(name) != "rest":
            hessians[hessian_name(name)] = torch.eye(tensor.shape[1])
    params = PackParams(**SECTIONS["pack"])
    packed = artifact.pack(state, hessians, model_params, params, pack_inputs.ENCODER, Logger(is_main=False))
    (folder / "model.bin").write_bytes(packed.blob)
