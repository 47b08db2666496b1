"""Error handling of the stand-alone commands.

A user error prints one line to stderr and exits with code 2, as in a stage.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

USER_ERROR = 2  # exit code of a command that stops because of something the user can mend


def exit_with_error(command: str, reason: object) -> NoReturn:
    """Print the reason as one line and exit with code 2."""
    sys.stderr.write(f"error: {command}: {' '.join(str(reason).split())}\n")
    raise SystemExit(USER_ERROR) from None


@contextlib.contextmanager
def user_errors(command: str, *errors: type[Exception]) -> Iterator[None]:
    """Context manager: report ValueError, OSError and `errors` as a user error and exit with code 2."""
    reported: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        yield
    except reported as error:
        exit_with_error(command, error)
