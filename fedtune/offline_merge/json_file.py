"""Read a JSON object from a file."""

import json
from pathlib import Path
from typing import Any

from fedtune.errors import SourceError

__all__ = ["read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; SourceError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} holds no JSON object; fetch it again")
    return found
