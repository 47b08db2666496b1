"""Runs side by side on one page: `python -m tools.report seed-42 seed-314 seed-999`.

The page works without a network: its pictures are in it, and nothing is loaded from elsewhere. The same pictures lie beside it as PNG.
Runs are folders, revisions or experiments; without a name, the working tree.
"""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path

from stages.common.cli_errors import refusing
from stages.scoring.evaluate import Stream, open_stream
from tools.compare import revisions
from tools.report import figures
from tools.report.run_data import Seen, read

PAGE = "index.html"
FIGURES = ("val_bpb", "val_loss", "bytes_total", "bytes_model", "bytes_code")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { width: 100%; height: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 13px } td, th { border-bottom: 1px solid #e4e7eb; padding: .3rem .7rem; text-align: left }
.fail { color: #d55e00; font-weight: bold }
"""


def draw(runs: Sequence[Seen], stream: Stream) -> dict[str, tuple[str, bytes]]:
    """Every picture by the name of its file, with what it shows."""
    found = {
        "side_by_side.png": ("Runs side by side, with intervals", figures.side_by_side(runs, stream)),
        "loss.png": ("Training loss by step and by second", figures.loss(runs)),
        "classes.png": (
            "Bits per byte by length of the document and position in it",
            figures.classes(runs, stream),
        ),
        "ttt_gain.png": ("Gain of test-time training over the stream", figures.gain(runs, stream)),
    }
    for i, run in enumerate(runs):
        found[f"tensors_{i}.png"] = (f"Bytes by tensor of {run.name}", figures.tensors(run))
        found[f"errors_{i}.png"] = (f"Quantisation error by layer of {run.name}", figures.errors(run))
    return found


def page(runs: Sequence[Seen], drawn: dict[str, tuple[str, bytes]]) -> str:
    """The HTML of the whole report."""
    images = [
        f'<img id="{html.escape(name[:-4])}" alt="{html.escape(what)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, (what, data) in drawn.items()
    ]
    names = ", ".join(run.name for run in runs)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Caddie: {html.escape(names)}</title>',
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>Runs side by side</h1>',
            table(
                ["", *(f"{run.name} (seed {run.seed})" for run in runs)],
                [[key, *(str(run.summary[key]) for run in runs)] for key in FIGURES],
            ),
            *images,
            "<h2>Audit</h2>",
            audit(runs),
            "</body></html>\n",
        ]
    )


def audit(runs: Sequence[Seen]) -> str:
    """The verdicts of every run by check, and the first run's evidence."""
    verdicts = [{(v["subject"], v["check"], v["name"]): v for v in run.summary["audit"]} for run in runs]
    rows = []
    for key in dict.fromkeys(key for of_run in verdicts for key in of_run):
        outcomes = [of_run[key]["outcome"] if key in of_run else "absent" for of_run in verdicts]
        evidence = next(of_run[key]["evidence"] for of_run in verdicts if key in of_run)
        rows.append([*key, *outcomes, evidence])
    return table(["of", "check", "name", *(run.name for run in runs), "evidence"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; a cell that says fail is marked."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (f"<td{' class=fail' if cell == 'fail' else ''}>{html.escape(cell)}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def write(names: Sequence[str], output: Path) -> Path:
    """Read the runs, draw, write page and pictures into `output`; the page's path."""
    val, tokenizer = map(Path, revisions.STREAM)
    stream = open_stream(val, tokenizer)
    runs = [read(name, stream) for name in names]
    drawn = draw(runs, stream)
    output.mkdir(parents=True, exist_ok=True)
    for name, (_, data) in drawn.items():
        (output / name).write_bytes(data)
    (output / PAGE).write_text(page(runs, drawn), encoding="utf-8")
    return output / PAGE


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="One page, with pictures, about one run or several side by side.",
    )
    what = "folder that holds artifacts/, revision or experiment; none: the working tree"
    parser.add_argument("runs", nargs="*", default=["."], metavar="RUN", help=what)
    parser.add_argument(
        "--output", type=Path, default=Path(".scratch/report"), metavar="DIR", help="where page and PNGs go"
    )
    arguments = parser.parse_args(argv)
    with refusing("report"):
        print(write(arguments.runs, arguments.output))
