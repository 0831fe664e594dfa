"""The home of a server, ``$FEDTUNE_HOME/server``: its CA, certificate, keys, settings and Flower's state."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fedtune import paths
from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.server import certificate_authority
from fedtune.server.server_settings import ServerSettings, check_server_settings, read_server_settings
from fedtune.shipped import fill_template

__all__ = ["ServerHome", "create_server_home", "exists", "open_server_home"]

_RENEW = timedelta(days=60)
"""How long before it expires the server's certificate is renewed. A server that is down has time, too."""


@dataclass(frozen=True)
class ServerHome:
    """The files of a server. They have mode 0600."""

    folder: Path
    settings: ServerSettings

    @property
    def ca_file(self) -> Path:
        """The CA certificate, which is public."""
        return self.folder / "ca.pem"

    @property
    def ca_key_file(self) -> Path:
        """The CA's private key."""
        return self.folder / "ca.key"

    @property
    def certificate_file(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def key_file(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def flower_home(self) -> Path:
        """Flower's home, which contains its database."""
        return self.folder / "flower"

    @property
    def operator_file(self) -> Path:
        """The operator file of this machine: URL, CA certificate and key as JSON."""
        return self.folder / "operator.json"

    @property
    def lock_file(self) -> Path:
        """The file that is locked while the server is up."""
        return self.folder / "lock"

    def encode_operator_file(self, key: str) -> bytes:
        """Return the content of an operator file."""
        return json.dumps(
            {"url": self.settings.get_public_url(), "ca": self.ca_file.read_text(), "key": key}, indent=2
        ).encode()

    def renew_certificate(self, *, force: bool = False) -> bool:
        """Renew the server's certificate if it expires soon or has other names; return whether it was renewed."""
        soon = min(
            datetime.now(UTC) + _RENEW, certificate_authority.ends(self.ca_file.read_bytes()) - timedelta(seconds=1)
        )
        if not force and certificate_authority.is_certificate_valid_for(
            self.certificate_file.read_bytes(), self.settings.hostnames, soon
        ):
            return False
        signed = certificate_authority.issue_server_certificate(
            self.ca_key_file.read_bytes(),
            self.ca_file.read_bytes(),
            self.key_file.read_bytes(),
            self.settings.hostnames,
        )
        write_bytes_atomically(self.certificate_file, signed)
        return True


def exists() -> bool:
    """Whether this machine has a server home."""
    return (paths.get_home_folder() / "server" / "server.yaml").exists()


def create_server_home(hostnames: list[str], listen: str) -> ServerHome:
    """Create a server home and return it; raise ServerError if there is one already."""
    folder = paths.get_home_folder() / "server"
    if exists():
        raise ServerError(
            f"{folder} is a server's home already; change its address with --hostname or --listen, edit server.yaml in "
            "it, or choose another FEDTUNE_HOME"
        )
    settings = check_server_settings({"hostnames": hostnames, "listen": listen}, "the options")
    made = ServerHome(folder, settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_bytes_atomically(made.ca_key_file, certificate_authority.generate_private_key())
    write_bytes_atomically(made.ca_file, certificate_authority.make_ca_certificate(made.ca_key_file.read_bytes()))
    write_bytes_atomically(made.key_file, certificate_authority.generate_private_key())
    made.renew_certificate(force=True)
    text = fill_template("server/server.yaml", listen=listen, hostnames=json.dumps(hostnames))
    write_bytes_atomically(folder / "server.yaml", text.encode())
    return made


def open_server_home() -> ServerHome:
    """Return the server home of this machine; raise ServerError if there is none or a setting is invalid."""
    folder = paths.get_home_folder() / "server"
    return ServerHome(folder, read_server_settings(folder / "server.yaml"))
