"""Inputs of everything that works on bytes of tokens: a tokenizer's byte table, its tokens, distributions."""

from pathlib import Path

import numpy as np

from stages.common import bpb
from stages.tokenize import tokenizer

TEXTS = [
    f"Document {i} says that {i * i} is the square of {i}, and that caf\u00e9 costs {i % 7}.\n" * 2
    for i in range(60)
]


def tokenised_texts(folder: Path) -> tuple[bpb.ByteTable, np.ndarray]:
    """The byte table of a tokenizer, which is trained in `folder`, and the ids of all TEXTS, (N,)."""
    path = folder / "tokenizer.model"
    path.write_bytes(tokenizer.train(TEXTS, 330, 1))
    processor = bpb.load_tokenizer(path)
    tokens = np.concatenate(
        [np.array([processor.bos_id(), *processor.encode(text)], dtype=np.uint16) for text in TEXTS]
    )
    return bpb.byte_table(processor), tokens


def random_log_probs(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """Log-probabilities of distributions that are peaked as a network's are, (count, V)."""
    logits = np.random.Generator(np.random.PCG64(seed)).normal(0, 4, (count, vocab))
    return logits - np.logaddexp.reduce(logits, axis=1)[:, None]
