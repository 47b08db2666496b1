"""Write runs side by side on one page: `python -m tools.report seed-42 seed-314 seed-999`.

The page contains its figures and loads nothing, so it works without a network. The same figures are
written next to it as PNG. A run is a folder, a revision or an experiment; without a name, the
working tree.
"""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path

from stages.common.cli_errors import user_errors
from stages.scoring.stream import ValidationStream, open_validation_stream
from tools import add_path_option, require_file, require_folder
from tools.compare import revisions
from tools.report import figures
from tools.report.run_data import RunData, read_run_data

PAGE_NAME = "index.html"
SUMMARY_FIELDS = ("val_bpb", "val_loss", "bytes_total", "bytes_model", "bytes_code")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262c }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { width: 100%; height: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 13px }
td, th { border-bottom: 1px solid #e4e7eb; padding: .3rem .7rem; text-align: left }
.fail { color: #d55e00; font-weight: bold }
"""


def draw_figures(runs: Sequence[RunData], stream: ValidationStream) -> dict[str, tuple[str, bytes]]:
    """Return every figure by file name: its caption and the PNG."""
    drawn = {
        "side_by_side.png": ("Runs side by side, with intervals", figures.side_by_side(runs, stream)),
        "loss.png": ("Training loss by step and by second", figures.training_loss(runs)),
        "classes.png": (
            "Bits per byte by length of the document and position in it",
            figures.bpb_by_bucket(runs, stream),
        ),
        "ttt_gain.png": ("Gain of test-time training over the stream", figures.ttt_gain(runs, stream)),
    }
    for i, run in enumerate(runs):
        drawn[f"tensors_{i}.png"] = (f"Bytes by tensor of {run.name}", figures.bytes_by_tensor(run))
        drawn[f"errors_{i}.png"] = (
            f"Quantisation error by layer of {run.name}",
            figures.quantisation_errors(run),
        )
    return drawn


def render_page(runs: Sequence[RunData], drawn: dict[str, tuple[str, bytes]]) -> str:
    """Return the HTML of the whole report."""
    # The head, and the figures of every run.
    names = ", ".join(run.name for run in runs)
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Caddie: {html.escape(names)}</title>\n"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        "<body><h1>Runs side by side</h1>"
    )
    columns = ["", *(f"{run.name} (seed {run.seed})" for run in runs)]
    rows = [[field, *(str(run.summary[field]) for run in runs)] for field in SUMMARY_FIELDS]

    # The drawn figures, as data in the page.
    images = []
    for name, (caption, png) in drawn.items():
        data = base64.b64encode(png).decode()
        images.append(
            f'<img id="{html.escape(name.removesuffix(".png"))}" alt="{html.escape(caption)}"'
            f' src="data:image/png;base64,{data}">'
        )

    # The page: fields of the runs, figures, audit.
    return "\n".join(
        [
            head,
            html_table(columns, rows),
            *images,
            "<h2>Audit</h2>",
            audit_table(runs),
            "</body></html>\n",
        ]
    )


def audit_table(runs: Sequence[RunData]) -> str:
    """Return a table of the audit verdicts of every run by check, with the evidence of the first run."""
    verdicts_by_run = []
    for run in runs:
        verdicts_by_run.append({(v["subject"], v["check"], v["name"]): v for v in run.summary["audit"]})

    all_checks: dict[tuple[str, str, str], None] = {}  # a set that keeps the order
    for verdicts in verdicts_by_run:
        all_checks |= dict.fromkeys(verdicts)

    rows = []
    for key in all_checks:
        outcomes = [verdicts[key]["outcome"] if key in verdicts else "absent" for verdicts in verdicts_by_run]
        evidence = next(verdicts[key]["evidence"] for verdicts in verdicts_by_run if key in verdicts)
        rows.append([*key, *outcomes, evidence])
    return html_table(["of", "check", "name", *(run.name for run in runs), "evidence"], rows)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; a cell with the text "fail" is highlighted."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        cells = []
        for cell in row:
            css_class = " class=fail" if cell == "fail" else ""
            cells.append(f"<td{css_class}>{html.escape(cell)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def write_report(names: Sequence[str], output: Path) -> Path:
    """Read the runs, draw the figures, write them and the page into `output`; return the path of the page."""
    # The names first: the stream takes longer to read.
    for name in names:
        if not Path(name).is_dir():
            revisions.resolve_commit(name)
    val, tokenizer = map(Path, revisions.STREAM_PATHS)
    require_file(tokenizer, "run `dvc repro tokenize` here first")
    require_folder(val, "run `dvc repro tokenize` here first")

    stream = open_validation_stream(val, tokenizer)
    runs = [read_run_data(name, stream) for name in names]
    drawn = draw_figures(runs, stream)

    output.mkdir(parents=True, exist_ok=True)
    for name, (_, png) in drawn.items():
        (output / name).write_bytes(png)
    (output / PAGE_NAME).write_text(render_page(runs, drawn), encoding="utf-8")
    return output / PAGE_NAME


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="Write one page with figures about one run, or about several side by side.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        default=["."],
        metavar="RUN",
        help="folder that contains artifacts/, or revision or experiment (default: the working tree)",
    )
    add_path_option(parser, "--output", ".scratch/report", "folder for the page and its PNG files")
    arguments = parser.parse_args(argv)
    with user_errors("report"):
        print(write_report(arguments.runs, arguments.output))
