"""Results as versioned JSON beside the scripts that made them."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["save"]

_PACKAGES = ("fedtune", "flwr", "torch", "transformers", "peft", "bitsandbytes")


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``benchmarks/results/<name>.json`` with the machine and the versions, and print the result."""
    about = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**about, **result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
