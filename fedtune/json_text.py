"""Values as JSON that every reader takes: what is not a finite number becomes null, since JSON has no word for it."""

import json
import math
from typing import Any

__all__ = ["json_text"]


def json_text(value: Any) -> str:
    """JSON text, indented by two; tuples become lists."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
