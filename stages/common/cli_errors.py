"""How a command beside the stages ends for what its user can mend: with one line and exit code 2, as a stage does (command.py)."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from stages.common.parallel import USER_ERROR


def refuse(command: str, reason: object) -> NoReturn:
    """Say why in one line, and exit."""
    sys.stderr.write(f"error: {command}: {' '.join(str(reason).split())}\n")
    raise SystemExit(USER_ERROR) from None


@contextlib.contextmanager
def refusing(command: str, *errors: type[Exception]) -> Iterator[None]:
    """Within, a ValueError, an OSError or one of `errors` is the user's."""
    of_the_user: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        yield
    except of_the_user as error:
        refuse(command, error)
