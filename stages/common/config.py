"""Loads params.yaml into frozen dataclasses, strictly.

A stage declares one dataclass whose fields name the sections that it reads; `load` fills it. The
sections of other stages are not checked, so that a new parameter of `pack` does not concern
`train`, but an unknown top-level name is an error for every stage. A wrong key or type is a
ValueError that names the dotted key, what was seen, and what was expected.
"""

import dataclasses
import math
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

P = TypeVar("P")

# Every top-level name of params.yaml: the seed, the scorer of the claim, what several stages share,
# and one section for each stage.
SECTIONS = (
    "seed",
    "scorer",
    "parallel",
    "model",
    "tokenize",
    "train",
    "calibrate",
    "pack",
    "sliding_eval",
    "ttt_eval",
    "bundle",
    "audit",
    "submission",
)

PRESET_FOLDER = Path("presets")  # files that set some keys of a parameter file (tools/preset.py)

# Keys that have another name now: old dotted key to new one. An old key is an error that names the
# new one.
RENAMED_KEYS = {
    "ttt_eval.confidence": "ttt_eval.weight_by_surprise",
    "audit.trained_share": "audit.chunked_scorer_share",
    "audit.handed_stretches": "audit.call_splits",
    "audit.graph_documents": "audit.order_documents",
    "submission.scorer": "scorer",
}


class InvalidKey(ValueError):
    """A value of the right type that cannot be right; `key` is relative to the section that raises it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


def reject(key: str, message: str) -> NoReturn:
    """Raise InvalidKey for `key` of the section being built; the loader prepends the section's name."""
    raise InvalidKey(key, message)


def require_positive(section: Any, *keys: str) -> None:
    """Raise InvalidKey for the first of `keys` that is not above zero."""
    for key in keys:
        if not getattr(section, key) > 0:
            reject(key, f"{getattr(section, key)} is not above zero")


def require_fraction(section: Any, *keys: str) -> None:
    """Raise InvalidKey for the first of `keys` outside [0, 1]."""
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            reject(key, f"{getattr(section, key)} is not between 0 and 1")


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the raw sections of a parameter file; only the top-level names are checked.

    A preset is refused: it has no value for the keys that it does not change.
    """
    if not path.exists() and (PRESET_FOLDER / f"{path}.yaml").exists():
        raise ValueError(
            f"there is no file {path}; for the preset of this name,"
            f" `python -m tools.preset {path} --output FILE` makes a parameter file"
        )
    raw = read_sections(path, SECTIONS, "name one with --params")
    if path.resolve().parent.name == PRESET_FOLDER.name and not raw.keys() >= set(SECTIONS):
        raise ValueError(
            f"{path} is a preset, which has only some of the keys;"
            f" `python -m tools.preset {path.stem} --output FILE` makes a parameter file of it"
        )
    return raw


def read_sections(path: Path, known: Collection[str], advice: str) -> dict[str, Any]:
    """Read the sections of a YAML file; names outside `known` are an error.

    `advice` completes the message when the file does not exist.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {advice}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, expected a mapping of sections")
    for name in raw:
        if name not in known:
            raise ValueError(f"{name}: unknown key in {path}; known are {', '.join(known)}")
    return raw


def override(raw: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Return a copy of `raw` with the assignments `key.path=value` applied.

    Values are YAML; the keys must exist.
    """
    merged = _copy(raw)
    for assignment in assignments:
        path, separator, value = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set {assignment}: expected key.path=value")
        *parents, leaf = path.split(".")
        node: Any = merged
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise _unknown_key(path, "--set only changes keys that the parameter file has")
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {value!r} is not YAML: {' '.join(str(error).split())}") from error
    return merged


def build(raw: dict[str, Any], schema: type[P]) -> P:
    """Fill the dataclass `schema`, whose fields are sections or top-level scalars, from the mapping `raw`."""
    wanted = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]

    # A key that moved to another section would otherwise be reported as missing there.
    for old, new in RENAMED_KEYS.items():
        if new.partition(".")[0] in wanted and _has_key(raw, old):
            raise _unknown_key(old, "")

    return _build({name: value for name, value in raw.items() if name in wanted}, schema, "")


def load(path: Path, schema: type[P], assignments: list[str]) -> P:
    """Fill `schema` from a parameter file and the assignments of `--set`."""
    return build(override(read_parameters(path), assignments), schema)


def _unknown_key(key: str, advice: str) -> ValueError:
    """The error for a dotted key that does not exist: its new name if it was renamed, else `advice`."""
    if key in RENAMED_KEYS:
        advice = f"it is called {RENAMED_KEYS[key]} now"
    return ValueError(f"{key}: unknown key; {advice}")


def _has_key(raw: Any, key: str) -> bool:
    """True if the nested mapping has the dotted key."""
    node = raw
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _copy(node: Any) -> Any:
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, dict) else node


def _build(raw: Any, schema: type[P], prefix: str) -> P:
    """Fill a dataclass; `prefix` is the dotted path of its section, with a dot at the end, for messages."""
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix[:-1]}: saw {raw!r}, expected a section with keys")

    # Unknown keys
    hints = get_type_hints(schema)
    known = ", ".join(prefix + name for name in hints)
    for key in raw:
        if key not in hints:
            raise _unknown_key(prefix + key, f"known are {known}")

    # Missing keys, types and values
    values = {}
    for key, hint in hints.items():
        if key not in raw:
            raise ValueError(
                f"{prefix}{key}: missing key; add it to the parameter file (see params.yaml for its meaning)"
            )
        values[key] = _value(raw[key], hint, prefix + key)

    # Bounds, which the dataclass checks itself
    try:
        return schema(**values)
    except InvalidKey as error:
        raise ValueError(f"{prefix}{error.key}: {error.message}") from error


def _value(raw: Any, hint: Any, key: str) -> Any:
    """Convert a raw value to the type `hint`; a ValueError that names `key` when it does not fit."""
    if dataclasses.is_dataclass(hint):
        return _build(raw, hint, key + ".")  # type: ignore[arg-type]

    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Literal:
        if raw not in arguments or type(raw) not in {type(choice) for choice in arguments}:
            raise ValueError(f"{key}: saw {raw!r}, expected one of {', '.join(map(repr, arguments))}")
        return raw
    if origin in (Union, types.UnionType):  # an optional value
        if raw is None:
            return None
        return _value(raw, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        return _tuple(raw, arguments, key)
    return _scalar(raw, hint, key)


def _tuple(raw: Any, hints: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """Convert a list to a tuple of the types `hints`; (T, ...) means any number of T."""
    any_length = hints[-1] is ...
    if not isinstance(raw, (list, tuple)) or not (any_length or len(raw) == len(hints)):
        length = "" if any_length else f" of {len(hints)} values"
        raise ValueError(f"{key}: saw {raw!r}, expected a list{length}")
    element_hints = [hints[0]] * len(raw) if any_length else hints
    values = []
    for i, (item, hint) in enumerate(zip(raw, element_hints, strict=True)):
        values.append(_value(item, hint, f"{key}[{i}]"))
    return tuple(values)


def _scalar(raw: Any, hint: type, key: str) -> Any:
    if hint is float and type(raw) is int:
        return float(raw)
    if hint is float and isinstance(raw, str) and _is_number(raw):
        raise ValueError(
            f"{key}: saw the string {raw!r}, expected a number; YAML 1.1 requires a dot in it, as in 1.0e-4"
        )
    if type(raw) is not hint:
        raise ValueError(f"{key}: saw {raw!r} ({type(raw).__name__}), expected {hint.__name__}")
    if isinstance(raw, float) and not math.isfinite(raw):
        raise ValueError(f"{key}: saw {raw!r}, expected a finite number")
    return raw


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
