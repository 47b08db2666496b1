"""Reading JSON files that must hold one object."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path, errors: str = "strict") -> dict[str, Any]:
    """Read a JSON object; a ValueError that names the file when it holds anything else.

    `errors` says what happens to bytes that are not UTF-8, as in `open`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors=errors))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value
