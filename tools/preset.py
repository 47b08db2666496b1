"""Lay a preset over params.yaml, in place: `python -m tools.preset record` lays presets/record.yaml.

Only the text of the values changes: comments, order and every key that the preset does not name stay as they are. A value is
replaced by the preset's own spelling of it, where the YAML parser says that it stands, and the result is parsed and held against
every stage's schema before it takes the old file's place. All presets set the same keys, so that what was laid before does not
show (a test).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.audit.params import Params as AuditParams
from stages.bundle.params import Params as BundleParams
from stages.calibrate.params import Params as CalibrateParams
from stages.common import config
from stages.common.cli_errors import refusing
from stages.pack.params import Params as PackParams
from stages.sliding_eval.params import Params as SlidingEvalParams
from stages.submission.params import Params as SubmissionParams
from stages.tokenize.params import Params as TokenizeParams
from stages.train.params import Params as TrainParams
from stages.ttt_eval.params import Params as TttEvalParams

FOLDER = Path("presets")
# In the order of the pipeline, so that the first complaint is the one that would come first.
SCHEMAS: tuple[type, ...] = (
    TokenizeParams,
    TrainParams,
    CalibrateParams,
    PackParams,
    SlidingEvalParams,
    TttEvalParams,
    BundleParams,
    AuditParams,
    SubmissionParams,
)


class Value(NamedTuple):
    """A value of a parameter file: its text, and where that stands."""

    text: str
    start: int
    end: int


def validate(raw: dict[str, Any]) -> None:
    """Raise ValueError unless every stage accepts its sections of `raw`."""
    for schema in SCHEMAS:
        config.build(raw, schema)


def values(text: str, name: str) -> dict[str, Value]:
    """The values of a parameter file's text by dotted key: top-level scalars, and the keys of each section.

    >>> values("seed: 42  # of all randomness", "params.yaml")
    {'seed': Value(text='42', start=6, end=8)}
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{name} is not a mapping of sections")
    found: dict[str, Value] = {}
    for dotted, leaf in _leaves(root):
        start, end = leaf.start_mark.index, leaf.end_mark.index
        if dotted in found:
            raise ValueError(f"{dotted}: set twice in {name}")
        if "\n" in text[start:end] or start == end:
            raise ValueError(
                f"{dotted}: {name} must give its value on the key's own line, a list in brackets"
            )
        found[dotted] = Value(text[start:end], start, end)
    return found


def _leaves(mapping: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    """Every value that is no mapping, with its dotted key."""
    for key, node in mapping.value:
        if isinstance(node, yaml.MappingNode):
            yield from ((f"{key.value}.{inner}", leaf) for inner, leaf in _leaves(node))
        else:
            yield key.value, node


def overlay(base: str, preset: str, base_name: str = "params.yaml", preset_name: str = "the preset") -> str:
    """The text `base` with the values of the text `preset` in place of its own."""
    old, new = values(base, base_name), values(preset, preset_name)
    for key in new:
        if key not in old:
            raise ValueError(f"{key}: {preset_name} sets a key that {base_name} does not have")
    merged, position = [], 0
    for key in sorted(new, key=lambda key: old[key].start):
        merged += [base[position : old[key].start], new[key].text]
        position = old[key].end
    text = "".join(merged) + base[position:]
    expected = config.override(yaml.safe_load(base), [f"{key}={value.text}" for key, value in new.items()])
    assert yaml.safe_load(text) == expected, "the merged text does not parse to the merged mapping"
    return text


def available(folder: Path) -> list[str]:
    """The names of the presets in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def lay(preset: Path, base: Path, output: Path) -> list[str]:
    """Write `base` with `preset` laid over it to `output`, once it is known to be valid; returns the changes as lines."""
    if not preset.is_file():
        raise ValueError(
            f"{preset} does not exist; the presets are {', '.join(available(preset.parent)) or 'none'}"
        )
    config.read(base)
    before = base.read_text(encoding="utf-8")
    after = overlay(before, preset.read_text(encoding="utf-8"), str(base), str(preset))
    validate(yaml.safe_load(after))
    partial = output.with_name(output.name + ".partial")
    partial.write_text(after, encoding="utf-8")
    partial.replace(output)
    old, new = values(before, str(base)), values(after, str(output))
    return [f"{key}: {old[key].text} -> {new[key].text}" for key in new if old[key].text != new[key].text]


def check(base: Path, folder: Path) -> list[str]:
    """Validate `base`, and each preset laid over it; returns a line for each."""
    validate(config.read(base))
    lines = [f"{base}: valid"]
    text = base.read_text(encoding="utf-8")
    for name in available(folder):
        path = folder / f"{name}.yaml"
        try:
            validate(yaml.safe_load(overlay(text, path.read_text(encoding="utf-8"), str(base), str(path))))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        lines.append(f"{path}: valid over {base}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command; a user's error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.preset", description="Lay a preset over the parameter file, in place."
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("name", nargs="?", metavar="NAME", help=f"a file of {FOLDER}/ without its ending")
    choice.add_argument(
        "--check", action="store_true", help="validate the parameter file and every preset, change nothing"
    )
    parser.add_argument(
        "--params",
        type=Path,
        default=Path("params.yaml"),
        metavar="FILE",
        help="the parameter file (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the result goes (default: the parameter file)"
    )
    arguments = parser.parse_args(argv)
    with refusing("preset", yaml.YAMLError):
        if arguments.check:
            lines = check(arguments.params, FOLDER)
        else:
            output = arguments.output or arguments.params
            lines = lay(FOLDER / f"{arguments.name}.yaml", arguments.params, output)
            lines.append(
                f"{output}: {len(lines)} values changed" if lines else f"{output}: already {arguments.name}"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
