"""`data/leaderboard.yaml`: what others' submissions report, who is to be credited for what, and what is new.

The file is data that people typed from pull requests, so reading it is strict: a wrong key or type is a ValueError that names the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stages.common import config

FILE = Path("data/leaderboard.yaml")
PULLS = "https://github.com/openai/parameter-golf/"
OPERATORS = ("=", ">")
# What an entry may leave out, by list.
OPTIONAL: dict[str, dict[str, Any]] = {
    "rows": {"note": None},
    "credits": {"author": None, "when": ()},
    "own": {"number": None, "author": None, "when": ()},
}

Status = Literal[
    "merged", "accepted", "open", "closed", "draft", "disputed", "removed", "excluded", "invalid"
]


@dataclass(frozen=True)
class Row:
    """One pull request's own figures; None is not stated."""

    number: int
    mean: float | None  # bpb over its seeds, on the challenge's validation set
    deviation: float | None  # of bpb between seeds
    seeds: int | None
    bytes: int | None  # both counted files, the worst seed
    status: Status
    source: str  # where the figures stand, below PULLS
    note: str | None

    @property
    def name(self) -> str:
        """As people call it."""
        return f"#{self.number}"


@dataclass(frozen=True)
class Credit:
    """Something that a submission builds on."""

    number: int | None  # the pull request; None: this project
    author: str | None  # the account
    what: str
    when: tuple[str, ...]  # conditions on parameters, `key = value` or `key > number`; none: the base

    def __post_init__(self) -> None:
        for condition in self.when:
            if condition.partition(" ")[2][:1] not in OPERATORS or len(condition.split(" ", 2)) != 3:
                config.reject("when", f"{condition!r} is neither `key = value` nor `key > number`")

    def applies(self, parameters: Mapping[str, Any]) -> bool:
        """Whether these parameters, by section, use it."""
        return all(_holds(condition, parameters) for condition in self.when)


@dataclass(frozen=True)
class Leaderboard:
    """The file."""

    rows: tuple[Row, ...]
    credits: tuple[Credit, ...]
    own: tuple[Credit, ...]

    def row(self, name: str) -> Row:
        """The row called `1493` or `#1493`; a ValueError where there is none, or it has no mean."""
        found = next((row for row in self.rows if str(row.number) == name.removeprefix("#")), None)
        if found is None:
            raise ValueError(f"{name} is not in {FILE}; it has {', '.join(row.name for row in self.rows)}")
        if found.mean is None:
            raise ValueError(f"{found.name} reports no score: nothing can be claimed against it")
        return found

    def credited(self, parameters: Mapping[str, Any]) -> list[Credit]:
        """What these parameters build on, the base first."""
        return [credit for credit in self.credits if credit.applies(parameters)]


def read(path: Path = FILE) -> Leaderboard:
    """The file, checked."""
    raw = config.mapping(path, OPTIONAL, "run this from the root of the repository")
    filled = {name: _with(raw.get(name), absent) for name, absent in OPTIONAL.items()}
    try:
        read_back = config.build(filled, Leaderboard)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    numbers = [row.number for row in read_back.rows]
    twice = {number for number in numbers if numbers.count(number) > 1}
    if twice:
        raise ValueError(f"{path}: rows has #{min(twice)} more than once")
    return read_back


def _with(entries: Any, absent: Mapping[str, Any]) -> Any:
    """The entries with what may be left out filled in; anything else is left for the schema to refuse."""
    return (
        [{**absent, **entry} if isinstance(entry, dict) else entry for entry in entries]
        if isinstance(entries, list)
        else entries
    )


def _holds(condition: str, parameters: Mapping[str, Any]) -> bool:
    key, operator, text = condition.split(" ", 2)
    value: Any = parameters
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{FILE}: when: {condition!r} names {key}, which is no parameter")
        value = value[part]
    wanted = yaml.safe_load(text)
    return bool(value == wanted if operator == "=" else value > wanted)
