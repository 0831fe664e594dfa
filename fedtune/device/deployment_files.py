"""Write the files that run a device as a service: a systemd unit, a Dockerfile, requirements and a wheel."""

import json
import re
import shlex
import sys
from pathlib import Path

from fedtune.device.join import FILES, check_data_source
from fedtune.files import write_bytes_atomically
from fedtune.minimal_install import list_requirements
from fedtune.shipped import fill_template
from fedtune.systemd_units import service, service_home
from fedtune.wheel import write_wheel

__all__ = ["write_deployment_files"]

_ARM_TORCH = "2.10.0"
"""The last torch on PyPI whose arm64 build (146 MB) does not need CUDA libraries."""
_INTEL, _ARM = (f'sys_platform == "linux" and platform_machine == "{name}"' for name in ("x86_64", "aarch64"))
_LOCAL_LABEL = re.compile(r"\+[a-z0-9.]+$")


def write_deployment_files(folder: Path, source: str, memory: int | None, user: str) -> tuple[Path, ...]:
    """Write the files and return their paths.

    ``source`` and ``memory`` are options of ``fedtune device join``; ``user`` is the user of the systemd unit. A path
    in ``source`` becomes absolute, because the service starts in another folder. Raise DataError if it does not exist.
    """
    check_data_source(source)
    source, path = _whole(source)
    words = ["device", "join", "--data", source, *(["--memory", f"{memory}"] if memory else [])]
    unit = service("clients/fedtune-device.service", words, user, service_home(user))
    wheel = write_wheel(folder)
    docker = fill_template(
        "clients/Dockerfile",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        wheel=wheel.name,
        mount=f"-v {shlex.quote(f'{path}:{path}:ro')} " if path else "",
        command=json.dumps(["fedtune", *words], ensure_ascii=False),
    )
    needed = fill_template(
        "clients/requirements.txt", requirements="\n".join(_portable(list_requirements(), wheel.name))
    )
    written = folder / "fedtune-device.service", folder / "Dockerfile", folder / "requirements.txt"
    for target, text in zip(written, (unit, docker, needed), strict=True):
        write_bytes_atomically(target, text.encode())
        target.chmod(0o644)
    return (*written, wheel)


def _whole(source: str) -> tuple[str, str]:
    """Return the source with an absolute path, and the path; the path is empty if the source has none."""
    kind, _, name = source.partition(":")
    if kind not in FILES:
        return source, ""
    path = Path(name).expanduser().absolute()
    return f"{kind}:{path}", str(path)


def _portable(lines: list[str], wheel: str) -> list[str]:
    """Return requirements for any processor, without CUDA. fedtune itself is the wheel beside the list."""
    found: list[str] = []
    for line in lines:
        name, _, version = _LOCAL_LABEL.sub("", line).partition("==")
        if name == "fedtune":
            found.append(f"./{wheel}")
        elif name == "torch":
            found += [f"torch=={version}+cpu; {_INTEL}", f"torch=={_ARM_TORCH}; {_ARM}"]
            found.append(f'torch=={version}; sys_platform != "linux"')
        else:
            found.append(f"{name}=={version}")
    return found
