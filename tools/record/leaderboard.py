"""Read data/leaderboard.yaml: figures that other submissions report, credits, and what is new here.

People typed the file from pull requests, so reading it is strict: a wrong key or type is a
ValueError that names the row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stages.common import config

FILE = Path("data/leaderboard.yaml")
PULL_REQUESTS = "https://github.com/openai/parameter-golf/"
OPERATORS = ("=", ">")
# Keys that an entry may leave out, with their defaults, by list.
OPTIONAL_KEYS: dict[str, dict[str, Any]] = {
    "rows": {"note": None},
    "credits": {"author": None, "when": ()},
    "own": {"number": None, "author": None, "when": ()},
}

Status = Literal[
    "merged", "accepted", "open", "closed", "draft", "disputed", "removed", "excluded", "invalid"
]


@dataclass(frozen=True)
class LeaderboardRow:
    """Figures that one pull request reports; None is not stated."""

    number: int
    mean: float | None  # bpb over its seeds, on the challenge's validation set
    deviation: float | None  # of bpb between seeds
    seeds: int | None
    bytes: int | None  # both counted files, the worst seed
    status: Status
    source: str  # page with the figures, relative to PULL_REQUESTS
    note: str | None

    @property
    def name(self) -> str:
        """Name of the pull request, such as #1493."""
        return f"#{self.number}"


@dataclass(frozen=True)
class Credit:
    """An idea or code that a submission builds on."""

    number: int | None  # the pull request; None: this project
    author: str | None  # GitHub account
    what: str
    when: tuple[str, ...]  # conditions on parameters, `key = value` or `key > number`; none: always

    def __post_init__(self) -> None:
        for condition in self.when:
            if condition.partition(" ")[2][:1] not in OPERATORS or len(condition.split(" ", 2)) != 3:
                config.reject("when", f"{condition!r} is neither `key = value` nor `key > number`")

    def applies(self, parameters: Mapping[str, Any]) -> bool:
        """Tell if a run with these parameters, by section, uses it."""
        return all(_holds(condition, parameters) for condition in self.when)


@dataclass(frozen=True)
class Leaderboard:
    """Content of the file."""

    rows: tuple[LeaderboardRow, ...]
    credits: tuple[Credit, ...]
    own: tuple[Credit, ...]  # new in this project

    def row(self, name: str) -> LeaderboardRow:
        """Return the row called `1493` or `#1493`; ValueError if there is none, or if it has no mean."""
        found = next((row for row in self.rows if str(row.number) == name.removeprefix("#")), None)
        if found is None:
            raise ValueError(f"{name} is not in {FILE}; it has {', '.join(row.name for row in self.rows)}")
        if found.mean is None:
            raise ValueError(f"{found.name} reports no score: nothing can be claimed against it")
        return found

    def credited(self, parameters: Mapping[str, Any]) -> list[Credit]:
        """Return the credits that a run with these parameters owes, in the order of the file."""
        return [credit for credit in self.credits if credit.applies(parameters)]


def read_leaderboard(path: Path = FILE) -> Leaderboard:
    """Read and check the file."""
    raw = config.read_sections(path, OPTIONAL_KEYS, "run this from the root of the repository")
    sections = {name: _with_defaults(raw.get(name), defaults) for name, defaults in OPTIONAL_KEYS.items()}
    try:
        leaderboard = config.build(sections, Leaderboard)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    numbers = [row.number for row in leaderboard.rows]
    repeated = {number for number in numbers if numbers.count(number) > 1}
    if repeated:
        raise ValueError(f"{path}: rows has #{min(repeated)} more than once")
    return leaderboard


def _with_defaults(entries: Any, defaults: Mapping[str, Any]) -> Any:
    """Fill in the missing keys of a list of entries; anything else is left for the schema to reject."""
    if not isinstance(entries, list):
        return entries
    return [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in entries]


def _holds(condition: str, parameters: Mapping[str, Any]) -> bool:
    key, operator, text = condition.split(" ", 2)
    value: Any = parameters
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{FILE}: when: {condition!r} names {key}, which is not a parameter")
        value = value[part]
    operand = yaml.safe_load(text)
    return bool(value == operand if operator == "=" else value > operand)
