"""The figures of all tensors (tensor_stats.py) together: layers.tsv, the metrics, and the table that `tools.inspect_model` prints."""

from collections.abc import Sequence

from stages.pack.file.container import Entry
from stages.pack.stats.tensor_stats import Row, container_row, row_of

COLUMNS = (
    "name", "kind", "shape", "form", "bytes", "bits_per_weight", "above_bound", "above_bound_by_column", "mean_squared_error",
    "relative_error", "expected_loss",
)  # fmt: skip


def rows_of(entries: Sequence[Entry], file_bytes: int) -> list[Row]:
    """What the file alone says of each tensor, and last the container."""
    rows = [row_of(entry) for entry in entries]
    return [*rows, container_row(rows, file_bytes)]


def tsv(rows: Sequence[Row]) -> str:
    """layers.tsv; an empty cell is unknown."""
    return "\n".join("\t".join(cells) for cells in [list(COLUMNS), *map(_cells, rows)]) + "\n"


def aligned(rows: Sequence[Row]) -> str:
    """The same for the eye, without the columns that no row fills, and with a line of totals."""
    total = sum(row.bytes for row in rows)
    weights = sum(row.weights for row in rows)
    lines = [
        list(COLUMNS),
        *map(_cells, rows),
        ["total", "", "", "", str(total), f"{8 * total / max(1, weights):.4f}", *[""] * 5],
    ]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in filled}
    text = [
        [line[i].ljust(widths[i]) if i < 3 else line[i].rjust(widths[i]) for i in filled] for line in lines
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in text) + "\n"


def metrics(rows: Sequence[Row], scale: float) -> dict[str, float]:
    """metrics.json: sizes, the quantiser's scale, rates above the bounds and errors of the quantised tensors."""
    total, weights = sum(row.bytes for row in rows), sum(row.weights for row in rows)
    quantised = [row for row in rows if row.relative_error is not None]
    relative = [row.relative_error for row in quantised if row.relative_error is not None]
    squared = sum(
        row.weights * row.mean_squared_error for row in quantised if row.mean_squared_error is not None
    )
    return {
        "bytes_model": total,
        "scale": scale,
        "bits_per_weight": 8 * total / weights,
        "above_bound": _mean(quantised, [row.above_bound for row in quantised]),
        "above_bound_by_column": _mean(quantised, [row.above_bound_by_column for row in quantised]),
        "expected_loss": sum(row.expected_loss or 0.0 for row in quantised),
        "quantisation_mean_squared_error": squared / sum(row.weights for row in quantised),
        "quantisation_relative_error": sum(relative) / len(relative),
        "quantisation_relative_error_worst": max(relative),
    }


def _mean(rows: Sequence[Row], figures: Sequence[float | None]) -> float:
    """Over weights."""
    return sum(row.weights * (figure or 0.0) for row, figure in zip(rows, figures, strict=True)) / sum(
        row.weights for row in rows
    )


def _cells(row: Row) -> list[str]:
    rates = [
        f"{figure:.4f}" if figure is not None else ""
        for figure in (row.bits_per_weight, row.above_bound, row.above_bound_by_column)
    ]
    errors = [
        f"{figure:.6e}" if figure is not None else ""
        for figure in (row.mean_squared_error, row.relative_error, row.expected_loss)
    ]
    return [row.name, row.kind, "x".join(map(str, row.shape)), row.form, str(row.bytes), *rates, *errors]
