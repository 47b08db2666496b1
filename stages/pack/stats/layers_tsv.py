"""Statistics of all tensors together: layers.tsv, metrics.json and the table of
tools.inspect_model.
"""

from collections.abc import Sequence

from stages.pack.file.container import EncodedTensor
from stages.pack.stats.tensor_stats import TensorStats, container_stats, stored_stats

COLUMNS = (
    "name", "kind", "shape", "form", "bytes", "bits_per_weight", "above_bound", "above_bound_by_column",
    "mean_squared_error", "relative_error", "expected_loss",
)  # fmt: skip
TEXT_COLUMNS = 3  # the first columns hold text, all others numbers


def stats_of_file(tensors: Sequence[EncodedTensor], file_bytes: int) -> list[TensorStats]:
    """Collect the statistics that a file alone gives, of each tensor and last of the container."""
    stats = [stored_stats(tensor) for tensor in tensors]
    return [*stats, container_stats(stats, file_bytes)]


def to_tsv(stats: Sequence[TensorStats]) -> str:
    """Format layers.tsv; an empty cell is unknown."""
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(_cells(row)) for row in stats]
    return "\n".join(lines) + "\n"


def text_table(stats: Sequence[TensorStats]) -> str:
    """Format the same as an aligned table with totals, without columns that no tensor fills."""
    total_bytes = sum(row.bytes for row in stats)
    weights = sum(row.weights for row in stats)
    totals = {
        "name": "total",
        "bytes": str(total_bytes),
        "bits_per_weight": f"{8 * total_bytes / max(1, weights):.4f}",
    }
    body = [*map(_cells, stats), [totals.get(column, "") for column in COLUMNS]]

    # Columns in which some line has a cell; text is aligned to the left, numbers to the right.
    lines = [""] * (1 + len(body))
    for index, column in enumerate(COLUMNS):
        cells = [column, *(line[index] for line in body)]
        if not any(cells[1:]):
            continue
        width = max(map(len, cells))
        aligned = [cell.ljust(width) if index < TEXT_COLUMNS else cell.rjust(width) for cell in cells]
        lines = [f"{line}  {cell}" if line else cell for line, cell in zip(lines, aligned, strict=True)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def metrics(stats: Sequence[TensorStats], coarseness: float) -> dict[str, float]:
    """Compute metrics.json: sizes, coarseness, rates above the bounds, errors of quantisation."""
    total_bytes = sum(row.bytes for row in stats)
    quantised = [row for row in stats if row.relative_error is not None]
    relative = [row.relative_error for row in quantised if row.relative_error is not None]
    squared = sum(
        row.weights * row.mean_squared_error for row in quantised if row.mean_squared_error is not None
    )
    return {
        "bytes_model": total_bytes,
        "coarseness": coarseness,
        "bits_per_weight": 8 * total_bytes / sum(row.weights for row in stats),
        "above_bound": _mean_over_weights(quantised, [row.above_bound for row in quantised]),
        "above_bound_by_column": _mean_over_weights(
            quantised, [row.above_bound_by_column for row in quantised]
        ),
        "expected_loss": sum(row.expected_loss or 0.0 for row in quantised),
        "quantisation_mean_squared_error": squared / sum(row.weights for row in quantised),
        "quantisation_relative_error": sum(relative) / len(relative),
        "quantisation_relative_error_worst": max(relative),
    }


def _mean_over_weights(stats: Sequence[TensorStats], figures: Sequence[float | None]) -> float:
    """Average a figure of each tensor over all weights; None counts as 0."""
    total = sum(row.weights * (figure or 0.0) for row, figure in zip(stats, figures, strict=True))
    return total / sum(row.weights for row in stats)


def _cells(row: TensorStats) -> list[str]:
    cells = [row.name, row.kind, "x".join(map(str, row.shape)), row.form, str(row.bytes)]
    cells += [
        _number(rate, ".4f") for rate in (row.bits_per_weight, row.above_bound, row.above_bound_by_column)
    ]
    cells += [_number(e, ".6e") for e in (row.mean_squared_error, row.relative_error, row.expected_loss)]
    return cells


def _number(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)
