"""Apply a preset to params.yaml, in place.

`python -m tools.preset record` applies presets/record.yaml. Only the text of values changes;
comments, order and every key that the preset does not name stay. The YAML parser gives the position
of each value, and the preset's spelling of it replaces the old one. The result is parsed and
checked against every stage's schema before it replaces the old file. All presets set the same keys,
so it does not matter which preset was applied before (a test).
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
from stages.common.cli_errors import user_errors
from stages.pack.params import Params as PackParams
from stages.sliding_eval.params import Params as SlidingEvalParams
from stages.submission.params import Params as SubmissionParams
from stages.tokenize.params import Params as TokenizeParams
from stages.train.params import Params as TrainParams
from stages.ttt_eval.params import Params as TttEvalParams
from tools import add_path_option

# In the order of the pipeline, so that the error shown is the one that a run would meet first.
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


class ScalarSpan(NamedTuple):
    """A value in a parameter file: its text, and the character offsets of it in the file."""

    text: str
    start: int
    end: int


def validate(raw: dict[str, Any]) -> None:
    """Raise ValueError unless every stage accepts its sections of `raw`."""
    for schema in SCHEMAS:
        config.build(raw, schema)


def scalar_spans(text: str, name: str) -> dict[str, ScalarSpan]:
    """Return the values in a parameter file's text by dotted key; `name` of the file is for error messages.

    >>> scalar_spans("seed: 42  # of all randomness", "params.yaml")
    {'seed': ScalarSpan(text='42', start=6, end=8)}
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{name} is not a mapping of sections")

    found: dict[str, ScalarSpan] = {}
    for key, node in _value_nodes(root):
        start = node.start_mark.index
        end = node.end_mark.index
        if key in found:
            raise ValueError(f"{key}: set twice in {name}")
        if "\n" in text[start:end] or start == end:
            raise ValueError(f"{key}: {name} must give its value on the key's own line, a list in brackets")
        found[key] = ScalarSpan(text[start:end], start, end)
    return found


def _value_nodes(mapping: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    """Yield every value that is not a mapping, with its dotted key."""
    for key, node in mapping.value:
        if isinstance(node, yaml.MappingNode):
            for inner_key, value in _value_nodes(node):
                yield f"{key.value}.{inner_key}", value
        else:
            yield key.value, node


def overlay(base: str, preset: str, base_name: str = "params.yaml", preset_name: str = "the preset") -> str:
    """Return the text `base` with its values replaced by those of the text `preset`."""
    old = scalar_spans(base, base_name)
    new = scalar_spans(preset, preset_name)
    for name, keys in ((base_name, old), (preset_name, new)):
        for key in keys:
            if key in config.RENAMED_KEYS:
                raise ValueError(f"{key}: {name} sets a key that is called {config.RENAMED_KEYS[key]} now")
    for key in new:
        if key not in old:
            raise ValueError(f"{key}: {preset_name} sets a key that {base_name} does not have")

    parts = []
    position = 0
    for key in sorted(new, key=lambda key: old[key].start):
        parts += [base[position : old[key].start], new[key].text]
        position = old[key].end
    text = "".join(parts) + base[position:]

    # The edited text must parse to what editing the parsed mapping gives.
    assignments = [f"{key}={value.text}" for key, value in new.items()]
    expected = config.override(yaml.safe_load(base), assignments)
    assert yaml.safe_load(text) == expected, "the merged text does not parse to the merged mapping"
    return text


def preset_names(folder: Path) -> list[str]:
    """Return the names of the presets in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def apply_preset(preset: Path, base: Path, output: Path) -> list[str]:
    """Write `base` with `preset` applied to `output`, if it is valid; return the changes as lines."""
    if not preset.is_file():
        names = ", ".join(preset_names(preset.parent)) or "none"
        raise ValueError(f"{preset} does not exist; the presets are {names}")

    config.read_parameters(base)  # a better error than the overlay's if `base` is not a parameter file
    before = base.read_text(encoding="utf-8")
    after = overlay(before, preset.read_text(encoding="utf-8"), str(base), str(preset))
    validate(yaml.safe_load(after))

    # Through a second file: a crash leaves the old or the new text, never half of one.
    partial = output.with_name(output.name + ".partial")
    partial.write_text(after, encoding="utf-8")
    partial.replace(output)

    old = scalar_spans(before, str(base))
    new = scalar_spans(after, str(output))
    return [f"{key}: {old[key].text} -> {new[key].text}" for key in new if old[key].text != new[key].text]


def validate_all(base: Path, folder: Path) -> list[str]:
    """Validate `base`, and `base` with each preset of `folder` applied; return a line for each."""
    validate(config.read_parameters(base))
    lines = [f"{base}: valid"]
    text = base.read_text(encoding="utf-8")
    for name in preset_names(folder):
        path = folder / f"{name}.yaml"
        try:
            validate(yaml.safe_load(overlay(text, path.read_text(encoding="utf-8"), str(base), str(path))))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        lines.append(f"{path}: valid over {base}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Apply a preset, or validate all of them, and print what was done."""
    arguments = _parser().parse_args(argv)
    with user_errors("preset", yaml.YAMLError):
        if arguments.check:
            lines = validate_all(arguments.params, config.PRESET_FOLDER)
        else:
            output = arguments.output or arguments.params
            lines = apply_preset(config.PRESET_FOLDER / f"{arguments.name}.yaml", arguments.params, output)
            if lines:
                lines.append(f"{output}: {len(lines)} values changed")
            else:
                lines.append(f"{output}: already {arguments.name}")
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.preset",
        description="Apply a preset to the parameter file: replace the values that the preset sets.",
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "name", nargs="?", metavar="NAME", help=f"a file in {config.PRESET_FOLDER}/, without its suffix"
    )
    choice.add_argument(
        "--check", action="store_true", help="only validate the parameter file and every preset"
    )
    add_path_option(parser, "--params", "params.yaml", "the parameter file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file for the result (default: the parameter file)"
    )
    return parser


if __name__ == "__main__":
    main()
