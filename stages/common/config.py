"""params.yaml to frozen dataclasses, strictly.

A stage declares one dataclass whose fields name the sections it reads; `load` fills it. Sections of other stages are left alone, so
that a new parameter of `pack` is none of train's business, but an unknown top-level name is an error for every stage. A wrong key or
type is a ValueError that names the dotted key, what was seen, and what was expected.
"""

import dataclasses
import math
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

P = TypeVar("P")

# Every top-level name of params.yaml: the seed, what several stages share, and one section for each stage.
SECTIONS = (
    "seed",
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


class InvalidKey(ValueError):
    """A parameter that has the right type and cannot be right; `key` is relative to the section that raises it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


def reject(key: str, message: str) -> NoReturn:
    """Refuse the parameter `key` of the section being built; the loader puts the section's name before it."""
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


def read(path: Path) -> dict[str, Any]:
    """The raw mapping of a parameter file; its top-level names are checked, nothing else."""
    return mapping(path, SECTIONS, "name one with --params")


def mapping(path: Path, known: Collection[str], otherwise: str) -> dict[str, Any]:
    """The sections of a YAML file, of which only `known` names are allowed; `otherwise` is what to do where there is no file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {otherwise}")
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
    """A copy of `raw` with each `key.path=value` laid over it; the value is YAML, the key must exist."""
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
            raise ValueError(f"{path}: unknown key; --set only changes keys that the parameter file has")
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {value!r} is not YAML: {' '.join(str(error).split())}") from error
    return merged


def build(raw: dict[str, Any], schema: type[P]) -> P:
    """The dataclass `schema`, whose fields are sections (or top-level scalars), filled from the mapping `raw`."""
    wanted = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    return _build({name: value for name, value in raw.items() if name in wanted}, schema, "")


def load(path: Path, schema: type[P], assignments: list[str]) -> P:
    """`schema` filled from the file at `path` with the assignments of `--set` laid over it."""
    return build(override(read(path), assignments), schema)


def _copy(node: Any) -> Any:
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, dict) else node


def _build(raw: Any, schema: type[P], prefix: str) -> P:
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix[:-1]}: saw {raw!r}, expected a section with keys")
    hints = get_type_hints(schema)
    for key in raw:
        if key not in hints:
            raise ValueError(
                f"{prefix}{key}: unknown key; known are {', '.join(prefix + name for name in hints)}"
            )
    values = {}
    for key, hint in hints.items():
        if key not in raw:
            raise ValueError(
                f"{prefix}{key}: missing key; add it to the parameter file (see params.yaml for its meaning)"
            )
        values[key] = _value(raw[key], hint, prefix + key)
    try:
        return schema(**values)
    except InvalidKey as error:
        raise ValueError(f"{prefix}{error.key}: {error.message}") from error


def _value(raw: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(raw, hint, key + ".")  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if raw not in arguments or type(raw) not in {type(choice) for choice in arguments}:
            raise ValueError(f"{key}: saw {raw!r}, expected one of {', '.join(map(repr, arguments))}")
        return raw
    if origin in (Union, types.UnionType):
        return None if raw is None else _value(raw, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        if not isinstance(raw, (list, tuple)) or (arguments[-1] is not ... and len(raw) != len(arguments)):
            raise ValueError(
                f"{key}: saw {raw!r}, expected a list"
                + ("" if arguments[-1] is ... else f" of {len(arguments)} values")
            )
        element_hints = [arguments[0]] * len(raw) if arguments[-1] is ... else arguments
        return tuple(
            _value(item, element, f"{key}[{i}]")
            for i, (item, element) in enumerate(zip(raw, element_hints, strict=True))
        )
    return _scalar(raw, hint, key)


def _scalar(raw: Any, hint: type, key: str) -> Any:
    if hint is float and type(raw) is int:
        return float(raw)
    if hint is float and isinstance(raw, str) and _is_number(raw):
        raise ValueError(
            f"{key}: saw the string {raw!r}, expected a number; YAML 1.1 wants a dot in it, as in 1.0e-4"
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
