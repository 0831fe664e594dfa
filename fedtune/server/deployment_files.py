"""Write the files that run a server as a service: a systemd unit, a Dockerfile, and the wheel that it installs."""

import shlex
import sys
from pathlib import Path

from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.server.server_settings import ServerSettings, read_server_settings
from fedtune.shipped import fill_template
from fedtune.systemd_units import service, service_home
from fedtune.wheel import write_wheel

__all__ = ["write_deployment_files"]


def write_deployment_files(folder: Path, user: str) -> tuple[Path, ...]:
    """Write the files for the server of ``user`` and return their paths; raise ServerError if there is no server."""
    place = service_home(user)
    settings_file = place / "server" / "server.yaml"
    if not settings_file.exists():
        raise ServerError(f"there is no server in {place / 'server'}; as {user}, create one with fedtune server init")
    settings = read_server_settings(settings_file)
    unit = service("server/fedtune-server.service", ["server", "up"], user, place)
    wheel = write_wheel(folder)
    written = folder / "fedtune-server.service", folder / "fedtune-server.Dockerfile"
    for path, text in zip(written, (unit, _fill_container_file(settings, wheel.name)), strict=True):
        write_bytes_atomically(path, text.encode())
        path.chmod(0o644)
    return (*written, wheel)


def _fill_container_file(settings: ServerSettings, wheel: str) -> str:
    """Return the Dockerfile. The server in the container has its own home, with the host names and port of this one."""
    return fill_template(
        "server/Dockerfile",
        names=" ".join(f"--hostname {shlex.quote(name)}" for name in settings.hostnames),
        port=settings.address[1],
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        wheel=wheel,
    )
