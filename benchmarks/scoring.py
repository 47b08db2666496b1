"""Counting bytes, shards and ledgers: what an evaluation does beside the model."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks._measure import measure
from stages.common import paired_bootstrap, shards
from stages.common.bpb import ByteTable, bits_per_byte, target_bytes

TOKENS = 1_000_000
VOCAB = 8192
DOCUMENT_TOKENS = 750
BOS = 1


def main() -> None:
    """Print one line for each case."""
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = generator.integers(4, VOCAB, TOKENS, dtype=np.uint16)
    tokens[::DOCUMENT_TOKENS] = BOS
    boundary = np.arange(VOCAB) < 4
    table = ByteTable(
        tuple(b"a" * size for size in generator.integers(1, 9, VOCAB).tolist()),
        generator.random(VOCAB) < 0.5,
        boundary,
        BOS,
    )
    counted = target_bytes(tokens, table)
    nll = generator.gamma(2.0, 1.0, TOKENS - 1).astype(np.float32)
    other = (nll * 0.99).astype(np.float32)
    documents = paired_bootstrap.document_of_target(tokens, BOS)
    measure(f"target_bytes, {TOKENS:,} tokens", TOKENS, "tokens", lambda: target_bytes(tokens, table))
    measure(f"bits_per_byte, {TOKENS:,} targets", TOKENS, "targets", lambda: bits_per_byte(nll, counted))
    resample = f"paired_difference, {int(documents.max()) + 1:,} documents, 2,000 resamples"
    measure(
        resample,
        2000,
        "resamples",
        lambda: paired_bootstrap.paired_difference(nll, other, counted, documents),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.bin"
        measure(f"shards.write, {TOKENS:,} tokens", TOKENS, "tokens", lambda: shards.write(path, tokens))
        measure(f"shards.stream, {TOKENS:,} tokens", TOKENS, "tokens", lambda: shards.stream(Path(folder)))


if __name__ == "__main__":
    main()
