"""Where the bytes of model.bin go, and what quantisation cost: layers.tsv, the metrics, and the table that `inspect` prints.

Two errors stand side by side: the mean squared difference of original and decoded weights, and the relative error of the layer's outputs
on the calibration data, tr(D H D^T) / tr(W H W^T) with D the difference, which is what GPTQ lowers.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stages.pack import gptq
from stages.pack.container import Entry

CONTAINER = "container"  # the last row: everything that is no tensor's, so that the column adds up to the file
COLUMNS = ("name", "kind", "shape", "bits", "bytes", "bits_per_weight", "mean_squared_error", "relative_error")


class Row(NamedTuple):
    """The figures of one tensor; None is unknown from what there is."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    bytes: int
    weights: int
    mean_squared_error: float | None = None
    relative_error: float | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """All the tensor's bytes, steps included, over its weights."""
        return 8 * self.bytes / self.weights if self.weights else None


def rows_of(entries: Sequence[Entry], file_bytes: int) -> list[Row]:
    """What the file alone says of each tensor, and last the container."""
    rows = []
    for entry in entries:
        weights = 1
        for size in entry.shape:
            weights *= size
        rows.append(Row(entry.name, entry.kind, entry.shape, entry.bits, entry.payload_bytes, weights))
    return [*rows, Row(CONTAINER, CONTAINER, (), None, file_bytes - sum(row.bytes for row in rows), 0)]


def with_errors(row: Row, weight: Tensor, decoded: Tensor, hessian: Tensor | None) -> Row:
    """The row with the errors of its tensor; without a Hessian there is no relative one."""
    difference = decoded - weight.detach().float()
    mean_squared = float(difference.double().square().mean()) if row.weights else 0.0
    relative = None
    if hessian is not None:
        scale = gptq.cost(weight.detach().float(), hessian)
        relative = gptq.cost(difference, hessian) / scale if scale > 0 else 0.0
    return row._replace(mean_squared_error=mean_squared, relative_error=relative)


def tsv(rows: Sequence[Row]) -> str:
    """layers.tsv; an empty cell is unknown."""
    return "\n".join("\t".join(cells) for cells in [list(COLUMNS), *map(_cells, rows)]) + "\n"


def aligned(rows: Sequence[Row]) -> str:
    """The same for the eye, without the columns that no row fills, and with a line of totals."""
    total = sum(row.bytes for row in rows)
    weights = sum(row.weights for row in rows)
    lines = [list(COLUMNS), *map(_cells, rows), ["total", "", "", "", str(total), f"{8 * total / max(1, weights):.4f}", "", ""]]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in filled}
    text = [[line[i].ljust(widths[i]) if i < 3 else line[i].rjust(widths[i]) for i in filled] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in text) + "\n"


def metrics(rows: Sequence[Row], clip_factor: float) -> dict[str, float]:
    """metrics.json: sizes, the clip factor, and the relative errors of the quantised tensors."""
    total, weights = sum(row.bytes for row in rows), sum(row.weights for row in rows)
    quantised = [row for row in rows if row.relative_error is not None]
    relative = [row.relative_error for row in quantised if row.relative_error is not None]
    squared = sum(row.weights * row.mean_squared_error for row in quantised if row.mean_squared_error is not None)
    return {
        "bytes_model": total,
        "clip_factor": clip_factor,
        "bits_per_weight": 8 * total / weights,
        "quantisation_mean_squared_error": squared / sum(row.weights for row in quantised),
        "quantisation_relative_error": sum(relative) / len(relative),
        "quantisation_relative_error_worst": max(relative),
    }


def _cells(row: Row) -> list[str]:
    figures = (f"{row.bits_per_weight:.4f}" if row.bits_per_weight is not None else "", row.mean_squared_error, row.relative_error)
    known = [figure if isinstance(figure, str) else "" if figure is None else f"{figure:.6e}" for figure in figures]
    shape = "x".join(map(str, row.shape))
    return [row.name, row.kind, shape, "" if row.bits is None else str(row.bits), str(row.bytes), *known]
