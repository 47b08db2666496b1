"""Ledgers: the loss of every target of an evaluation, from which every metric, plot and comparison comes.

`nll.npy` holds N-1 float32 values in nats, in stream order, for a stream of N tokens.
"""

from pathlib import Path

import numpy as np

from stages.common.bpb import bits_per_byte

CHUNK_COLUMNS = ("chunk", "first_target", "targets", "bytes", "bpb", "cumulative_bpb")


def write(path: Path, nll: np.ndarray) -> None:
    """Write a ledger; (N-1,) float32, finite and not negative."""
    check(nll)
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(nll, dtype=np.float32), allow_pickle=False)


def read(path: Path, targets: int) -> np.ndarray:
    """Read a ledger and hold it against the number of targets of its stream."""
    try:
        nll = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a ledger: {error}") from error
    if nll.dtype != np.float32 or nll.shape != (targets,):
        raise ValueError(
            f"{path} holds {nll.dtype} {nll.shape}, expected float32 ({targets},): it belongs to another stream"
        )
    check(nll)
    return nll


def check(nll: np.ndarray) -> None:
    """Raise ValueError unless every target has a loss: finite, not negative."""
    bad = np.flatnonzero(~(np.isfinite(nll) & (nll >= 0)))
    if len(bad):
        raise ValueError(
            f"target {bad[0]} has loss {nll[bad[0]]} ({len(bad)} such): every target needs one finite loss"
        )


def write_chunks(path: Path, nll: np.ndarray, counted_bytes: np.ndarray, chunk: int) -> None:
    """A TSV of bpb by chunk of `chunk` targets, and cumulative; the last chunk may be shorter."""
    lines = ["\t".join(CHUNK_COLUMNS)]
    for number, start in enumerate(range(0, len(nll), chunk)):
        part = slice(start, start + chunk)
        here = bits_per_byte(nll[part], counted_bytes[part]) if counted_bytes[part].any() else 0.0
        so_far = bits_per_byte(nll[: start + chunk], counted_bytes[: start + chunk])
        row = (number, start, len(nll[part]), int(counted_bytes[part].sum()), f"{here:.6f}", f"{so_far:.6f}")
        lines.append("\t".join(map(str, row)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
