"""Speed of an evaluation's work outside the model: bytes, shards, ledgers."""

import functools
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
    # A stream of random tokens, a table of pieces of 1 to 8 bytes, and two ledgers.
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = generator.integers(4, VOCAB, TOKENS, dtype=np.uint16)
    tokens[::DOCUMENT_TOKENS] = BOS
    pieces = tuple(b"a" * size for size in generator.integers(1, 9, VOCAB).tolist())
    leading_space = generator.random(VOCAB) < 0.5
    table = ByteTable(pieces, leading_space, np.arange(VOCAB) < 4, BOS)
    counted = target_bytes(tokens, table)
    nll = generator.gamma(2.0, 1.0, TOKENS - 1).astype(np.float32)
    other = (nll * 0.99).astype(np.float32)
    documents = paired_bootstrap.document_of_target(tokens, BOS)

    # Bytes, and bits per byte.
    measure(f"target_bytes, {TOKENS:,} tokens", TOKENS, "tokens", lambda: target_bytes(tokens, table))
    measure(f"bits_per_byte, {TOKENS:,} targets", TOKENS, "targets", lambda: bits_per_byte(nll, counted))

    # The paired comparison.
    name = f"paired_difference, {int(documents.max()) + 1:,} documents, 2,000 resamples"
    difference = functools.partial(paired_bootstrap.paired_difference, nll, other, counted, documents)
    measure(name, 2000, "resamples", difference)

    # Shards.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.bin"
        measure(f"shards.write, {TOKENS:,} tokens", TOKENS, "tokens", lambda: shards.write(path, tokens))
        measure(f"shards.stream, {TOKENS:,} tokens", TOKENS, "tokens", lambda: shards.stream(Path(folder)))


if __name__ == "__main__":
    main()
