"""The settings of a server, in server.yaml. Keys that were renamed are read under their old names too."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import ServerError
from fedtune.recipe.validation_errors import explain_validation_error
from fedtune.recipe.yaml_text import YamlError, load

__all__ = ["RENAMED_KEYS", "ServerSettings", "check_server_settings", "read_server_settings", "translate_keys"]

RENAMED_KEYS = {"names": "hostnames", "deadline": "default_deadline"}
"""The new name of each renamed key, by its old name."""


class ServerSettings(BaseModel):
    """The settings in server.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = Field("127.0.0.1:8443", pattern=r"^\S+:\d{1,5}$")
    hostnames: list[str] = Field(["localhost"], min_length=1)
    store: str | None = None
    default_deadline: float = Field(3600, gt=0)
    body_limit: int = Field(1 << 26, ge=1 << 20)
    connections: int = Field(256, ge=1)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    def get_public_url(self) -> str:
        """Return the URL that devices and operators connect to."""
        first = self.hostnames[0]
        return f"https://{f'[{first}]' if ':' in first else first}:{self.address[1]}"


def read_server_settings(path: Path) -> ServerSettings:
    """Read a server.yaml; raise ServerError if it does not exist or a setting is wrong.

    One line on standard error names the keys that the file has under their old names.
    """
    try:
        read = load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ServerError(f"there is no server in {path.parent}; create one with fedtune server init") from error
    except UnicodeDecodeError as error:
        raise ServerError(f"{path} is not UTF-8 text; write it again in UTF-8") from error
    except YamlError as error:
        raise ServerError(f"{path} {error}") from error
    written = read if isinstance(read, dict) else {}
    settings = check_server_settings(written, str(path))
    if old := [key for key in RENAMED_KEYS if key in written]:
        mend = ", ".join(f"{key} is now {RENAMED_KEYS[key]}" for key in old)
        print(f"fedtune: {path} has old names of settings: {mend}", file=sys.stderr, flush=True)
    return settings


def check_server_settings(values: Mapping[str, Any], origin: str) -> ServerSettings:
    """Return the settings; raise ServerError for one that is wrong."""
    try:
        return ServerSettings.model_validate(translate_keys(values))
    except ValidationError as error:
        raise ServerError(explain_validation_error(error, ServerSettings, origin)) from error


def translate_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with new key names. If both names of a key are present, both stay: the old one is refused."""
    present = {old: new for old, new in RENAMED_KEYS.items() if new not in values}
    return {present.get(key, key): value for key, value in values.items()}
