"""A systemd unit that keeps a server up."""

from pathlib import Path

from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.systemd import service, service_home

__all__ = ["package"]


def package(folder: Path, user: str) -> Path:
    """Write the unit for the server of ``user``; ServerError where its home holds none."""
    place = service_home(user)
    if not (place / "server" / "server.yaml").exists():
        raise ServerError(f"there is no server in {place / 'server'}; as {user}, make one with fedtune server init")
    path = folder / "fedtune-server.service"
    write_bytes_atomically(path, service("server/fedtune-server.service", ["server", "up"], user, place).encode())
    path.chmod(0o644)
    return path
