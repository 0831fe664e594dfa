"""Files that keep a device joined: a systemd unit, a Dockerfile, and a thin install with the wheel it is made from."""

import json
import re
import shlex
import sys
from pathlib import Path

from clients.join import FILES, check_source
from clients.wheel import write_wheel
from fedtune.files import write
from fedtune.systemd import service, service_home
from fedtune.thin import requirements

__all__ = ["package"]

_DOCKERFILE = """\
# From the folder of this file; on x86-64 add --build-arg PIP_EXTRA_INDEX_URL=ADDRESS, see requirements.txt:
# docker build -t fedtune-device .
# docker run -it --rm -v fedtune:/var/lib/fedtune fedtune-device fedtune device enroll --token -
# docker run -d --init -v fedtune:/var/lib/fedtune {mount}--restart unless-stopped fedtune-device
FROM python:{python}-slim
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/fedtune
COPY requirements.txt {wheel} ./
RUN pip install --no-cache-dir --no-deps -r requirements.txt
RUN useradd --system --create-home --home-dir /var/lib/fedtune fedtune
USER fedtune
ENV FEDTUNE_HOME=/var/lib/fedtune
VOLUME /var/lib/fedtune
HEALTHCHECK --interval=5m CMD ["fedtune", "device", "status"]
CMD {command}
"""
_REQUIREMENTS = """\
# A device's thin install, without what only servers, pictures and re-basin use; versions are those of this machine.
# From the folder of this file, which holds fedtune itself:
# python -m venv device && device/bin/pip install --no-deps -r requirements.txt
# On x86-64 an ordinary index has torch with CUDA, which does not work without 3 GB of libraries that are not listed
# here. Name PyTorch's own index of CPU builds with --extra-index-url; its address is on PyTorch's page for installing.
"""
_ARM_TORCH = "2.10.0"
"""The newest torch that was tried whose build for arm64 on an ordinary index is without CUDA: 146 MB."""
_LOCAL_LABEL = re.compile(r"\+[a-z0-9.]+$")


def package(folder: Path, source: str, memory: int | None, user: str) -> tuple[Path, ...]:
    """Write the files; ``source`` and ``memory`` are those of ``fedtune device join``, ``user`` is the unit's.

    A path in ``source`` is made absolute, since what joins the device starts elsewhere. DataError when it is not there.
    """
    check_source(source)
    source, path = _whole(source)
    words = ["device", "join", "--data", source, *(["--memory", f"{memory}"] if memory else [])]
    unit = service("fedtune-device", "fedtune device", words, user, service_home(user))
    wheel = write_wheel(folder)
    docker = _DOCKERFILE.format(
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        wheel=wheel.name,
        mount=f"-v {shlex.quote(f'{path}:{path}:ro')} " if path else "",
        command=json.dumps(["fedtune", *words], ensure_ascii=False),
    )
    needed = _REQUIREMENTS + "\n".join(_portable(requirements(), wheel.name)) + "\n"
    written = folder / "fedtune-device.service", folder / "Dockerfile", folder / "requirements.txt"
    for target, text in zip(written, (unit, docker, needed), strict=True):
        write(target, text.encode())
        target.chmod(0o644)
    return (*written, wheel)


def _whole(source: str) -> tuple[str, str]:
    """A source with its path made absolute, and that path; empty where the source names none."""
    kind, _, name = source.partition(":")
    if kind not in FILES:
        return source, ""
    path = Path(name).expanduser().absolute()
    return f"{kind}:{path}", str(path)


def _portable(lines: list[str], wheel: str) -> list[str]:
    """Requirements as an ordinary index has them, for any processor; fedtune itself is the wheel beside the list."""
    found: list[str] = []
    for line in lines:
        name, _, version = _LOCAL_LABEL.sub("", line).partition("==")
        if name == "fedtune":
            found.append(f"./{wheel}")
        elif name == "torch":
            found.append(f'torch=={version}; platform_machine != "aarch64"')
            found.append(f'torch=={_ARM_TORCH}; platform_machine == "aarch64"')
        else:
            found.append(f"{name}=={version}")
    return found
