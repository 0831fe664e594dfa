"""Files that keep a device joined: a systemd unit for a machine, a Dockerfile for a container, a list to install by."""

import shlex
import sys
from pathlib import Path

from fedtune import home
from fedtune.files import write
from fedtune.thin import requirements

__all__ = ["package"]

_UNIT = """\
[Unit]
Description=fedtune device
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
Environment=FEDTUNE_HOME={home}
Restart=always
RestartSec=5
KillSignal=SIGTERM
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
ReadWritePaths={home}

[Install]
WantedBy=multi-user.target
"""
_DOCKERFILE = """\
# docker build -t fedtune-device .
# docker run -v fedtune:/var/lib/fedtune fedtune-device fedtune device enroll URL --token TOKEN
# docker run -v fedtune:/var/lib/fedtune -v FOLDER:/data:ro --restart always fedtune-device
FROM python:{python}-slim
COPY requirements.txt .
RUN pip install --no-cache-dir --no-deps -r requirements.txt
RUN useradd --system --create-home --home-dir /var/lib/fedtune fedtune
USER fedtune
ENV FEDTUNE_HOME=/var/lib/fedtune
VOLUME /var/lib/fedtune
CMD {command}
"""
_REQUIREMENTS = """\
# A device's thin install, without what only servers, pictures and re-basin use; versions are those of this machine.
# python -m venv device && device/bin/pip install --no-deps -r requirements.txt
"""


def package(folder: Path, options: list[str]) -> tuple[Path, ...]:
    """Write the files; ``options`` are those of ``fedtune device join``."""
    here = Path(sys.executable).parent / "fedtune"
    unit = _UNIT.format(command=shlex.join([str(here), "device", "join", *options]), home=home.home())
    words = ", ".join(f'"{word}"' for word in ["fedtune", "device", "join", *options])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    docker = _DOCKERFILE.format(python=python, command=f"[{words}]")
    needed = _REQUIREMENTS + "\n".join(requirements()) + "\n"
    written = folder / "fedtune-device.service", folder / "Dockerfile", folder / "requirements.txt"
    for path, text in zip(written, (unit, docker, needed), strict=True):
        write(path, text.encode())
        path.chmod(0o644)
    return written
