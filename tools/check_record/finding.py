"""Something in a folder that does not add up."""

from typing import Any, NamedTuple

CAP = 16_000_000  # bytes of code and model (README of the challenge)
BUDGET_SECONDS = 600.0


class Finding(NamedTuple):
    """One line of the report."""

    where: str  # the file
    what: str  # what was seen, and what it should be
    like: str  # pull requests in which reviewers found the same, or the rule

    def line(self) -> str:
        """As it is printed."""
        return f"{self.where}: {self.what} [{self.like}]"


def shown(value: Any) -> str:
    """A number as people write it."""
    return f"{value:,}" if isinstance(value, int) else str(value)
