"""A finding: something in a record folder that is inconsistent or against the rules."""

from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One line of the report."""

    file: str
    message: str  # the value found, and the value expected
    reference: str  # pull requests in which reviewers found the same, or the rule

    def line(self) -> str:
        """Return the finding as it is printed."""
        return f"{self.file}: {self.message} [{self.reference}]"


def format_value(value: Any) -> str:
    """Return a value as text; integers get thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)
