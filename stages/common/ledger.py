"""Ledgers: the loss of every target of an evaluation. All metrics, plots and comparisons come from them.

For a stream of N tokens, `nll.npy` has N-1 float32 values in nats, in the order of the stream.
"""

from pathlib import Path

import numpy as np

from stages.common.bpb import bits_per_byte

CHUNK_COLUMNS = ("chunk", "first_target", "targets", "bytes", "bpb", "cumulative_bpb")


def write(path: Path, nll: np.ndarray) -> None:
    """Write a ledger (N-1,); every loss must be finite and not negative."""
    check(nll)
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(nll, dtype=np.float32), allow_pickle=False)


def read(path: Path, targets: int) -> np.ndarray:
    """Read a ledger, (targets,) float32; a ValueError when it has another number of targets."""
    try:
        nll = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a ledger: {error}") from error
    if nll.dtype != np.float32 or nll.shape != (targets,):
        raise ValueError(
            f"{path} holds {nll.dtype} {nll.shape}, expected float32 ({targets},):"
            " it belongs to another stream"
        )
    check(nll)
    return nll


def check(nll: np.ndarray) -> None:
    """Raise ValueError unless every loss of a ledger (N-1,) is finite and not negative."""
    bad = np.flatnonzero(~(np.isfinite(nll) & (nll >= 0)))
    if len(bad):
        raise ValueError(
            f"target {bad[0]} has loss {nll[bad[0]]} ({len(bad)} such): every target needs one finite loss"
        )


def write_chunks(path: Path, nll: np.ndarray, counted_bytes: np.ndarray, chunk: int) -> None:
    """Write a TSV with the bits per byte of each chunk of `chunk` targets, and of all up to its end.

    `nll` and `counted_bytes` are (N-1,). The last chunk may be shorter. A chunk without bytes has
    0.
    """
    lines = ["\t".join(CHUNK_COLUMNS)]
    for number, start in enumerate(range(0, len(nll), chunk)):
        end = start + chunk
        nll_of_chunk = nll[start:end]
        bytes_of_chunk = counted_bytes[start:end]

        bpb = bits_per_byte(nll_of_chunk, bytes_of_chunk) if bytes_of_chunk.any() else 0.0
        cumulative = bits_per_byte(nll[:end], counted_bytes[:end])
        row = (
            number,
            start,
            len(nll_of_chunk),
            int(bytes_of_chunk.sum()),
            f"{bpb:.6f}",
            f"{cumulative:.6f}",
        )
        lines.append("\t".join(map(str, row)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
