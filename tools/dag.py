"""Draw the pipeline of dvc.yaml as a Mermaid chart into README.md and docs/architecture.md.

An arrow is what one stage writes and another reads; figures and clocks (FIGURES) are left out. A
stage that reads from nearly all others would bury the chart under its arrows: of these, the ones
are left out that a path over other stages implies (transitive reduction). tests/test_dag.py fails
if a document has another chart than dvc.yaml gives.
"""

import argparse
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from stages.common.cli_errors import user_errors

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/architecture.md")
BEGIN, END = "<!-- dag -->\n", "<!-- /dag -->"
FIGURES = ("chunks.tsv", "manifest.json", "metrics.json", "schedule.json", "timing.json")
COUNTED = ("model.bin", "train_gpt.py")  # the two files whose bytes the challenge counts
MANY = 5  # a stage that reads from at least this many others gets the reduced arrows
Arrows = dict[tuple[str, str], list[str]]  # what is read, by (writing stage, reading stage)


def main() -> None:
    """Write the chart into the documents, or print it."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.dag",
        description="Draw the pipeline of dvc.yaml into README.md and docs/architecture.md.",
    )
    parser.add_argument("--print", action="store_true", help="print the chart instead")
    arguments = parser.parse_args()
    with user_errors("dag", yaml.YAMLError):
        chart = mermaid(read_stages(ROOT / "dvc.yaml"))
        if arguments.print:
            print(chart, end="")
            return

        # Both documents have their markers, or neither is written.
        paths = [ROOT / name for name in DOCUMENTS]
        texts = [with_chart(path.read_text(encoding="utf-8"), chart) for path in paths]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")


def read_stages(path: Path) -> dict[str, Any]:
    """Read the stages of a dvc.yaml; a ValueError unless each has a command (templates have none)."""
    pipeline = yaml.safe_load(path.read_text(encoding="utf-8"))
    stages = pipeline.get("stages") if isinstance(pipeline, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) and "cmd" in s for s in stages.values()):
        raise ValueError(f"{path}: expected a section `stages`, each with a `cmd`; templates are not drawn")
    return stages


def with_chart(document: str, chart: str) -> str:
    """Replace what is between the markers of a document by the chart."""
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", document)
    if parts[1::2] != [BEGIN, END]:
        raise ValueError(f"expected one {BEGIN.strip()} and one {END} after it, found {parts[1::2]}")
    parts[2] = chart
    return "".join(parts)


def mermaid(stages: dict[str, Any]) -> str:
    """Return the chart as a fenced block of Markdown; `stages` is that section of dvc.yaml."""
    lines = ["flowchart LR"]

    # Stages, each with the counted files that it is the first to write.
    drawn: set[str] = set()
    for name, stage in stages.items():
        files = {PurePosixPath(path).name for path in _outputs(stage)}
        counted = sorted(files & set(COUNTED) - drawn)
        drawn |= files
        label = "<br/>".join([name, *(f"<b>{file}</b>" for file in counted)])
        lines.append(f'  {name}["{label}"]' + (":::counted" if counted else ""))

    # Inputs, with rounded corners.
    lines += [
        '  data(["documents in data/"]):::input --> tokenize',
        '  source(["stages/ as text"]):::input --> bundle',
    ]

    # Arrows.
    arrows = _arrows(stages)
    for (writer, reader), names in arrows.items():
        sources = {first for first, last in arrows if last == reader}
        if len(sources) < MANY:
            lines.append(f'  {writer} -->|"{"<br/>".join(names)}"| {reader}')
        elif not _is_implied(arrows, writer, reader):
            lines.append(f"  {writer} --> {reader}")

    lines += ["  classDef counted fill:#fdf1e3,stroke:#d08a36,color:#1f2328"]
    lines += ["  classDef input fill:#f6f8fa,stroke:#afb8c1,color:#1f2328,stroke-dasharray:5 4"]
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def _arrows(stages: dict[str, Any]) -> Arrows:
    """Collect the artifacts that are written by one stage and read by another."""
    arrows: Arrows = {}
    for reader, stage in stages.items():
        for dependency in stage.get("deps") or []:
            path = PurePosixPath(dependency)
            if path.parts[0] != "artifacts" or len(path.parts) < 3 or path.parts[1] not in stages:
                continue
            files = arrows.setdefault((path.parts[1], reader), [])
            if path.name not in FIGURES:
                files.append(path.name if path.suffix else f"{path.name}/")
    return {pair: files for pair, files in arrows.items() if files}


def _is_implied(arrows: Arrows, writer: str, reader: str) -> bool:
    """Tell if another path of arrows leads from one stage to the other."""
    reached = {last for first, last in arrows if first == writer and last != reader}
    while True:
        further = reached | {last for first, last in arrows if first in reached}
        if further == reached:
            return reader in reached
        reached = further


def _outputs(stage: dict[str, Any]) -> list[str]:
    """List the paths of a stage's outputs; an entry with options is a mapping of one key."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind) or []]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


if __name__ == "__main__":
    main()
