"""A server and four devices on this machine, by the commands an operator types; one device is killed and comes back.

Run: python -m benchmarks.devices_demo     or: make devices-demo
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "devices.yaml"
FEDTUNE = (sys.executable, "-m", "fedtune.cli.main")
DEVICES = 4
PATIENCE = 120.0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fedtune-devices-") as folder, ExitStack() as running:
        work = Path(folder)
        server = home(work / "server")
        shown(server, "server", "init", "--hostname", "127.0.0.1", "--listen", f"127.0.0.1:{free_port()}")
        running.enter_context(background(server, work / "server.log", "server", "up"))
        until_up(server)
        devices = [enrolled(server, work, number) for number in range(DEVICES)]
        joins = [join(work, device, number) for number, device in enumerate(devices)]
        processes = [running.enter_context(one) for one in joins]
        submitted = running.enter_context(watched(server))
        for line in submitted:
            print(line, end="", flush=True)
            if line.startswith("round 1/"):
                print(f"killing device-{DEVICES - 1} with -9, and starting it again")
                processes[-1].kill()
                running.enter_context(join(work, devices[-1], DEVICES - 1))
        shown(server, "server", "devices")
        shown(server, "runs", "show", "latest")


def home(folder: Path) -> dict[str, str]:
    """The environment of one machine: a home of its own, the cache shared."""
    return {"FEDTUNE_CACHE": str(Path("~/.fedtune/cache").expanduser()), **os.environ, "FEDTUNE_HOME": str(folder)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def shown(environment: Mapping[str, str], *words: str) -> None:
    """A command and what it prints."""
    print(f"\n$ fedtune {' '.join(words)}", flush=True)
    subprocess.run([*FEDTUNE, *words], env=environment, check=True)


def asked(environment: Mapping[str, str], *words: str) -> str:
    return subprocess.run([*FEDTUNE, *words], env=environment, check=True, capture_output=True, text=True).stdout


@contextmanager
def background(environment: Mapping[str, str], log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that goes on until the block ends."""
    print(f"\n$ fedtune {' '.join(words)} &", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen([*FEDTUNE, *words], env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def until_up(server: Mapping[str, str]) -> None:
    end = time.monotonic() + PATIENCE
    while subprocess.run([*FEDTUNE, "server", "devices"], env=server, capture_output=True, check=False).returncode:
        if time.monotonic() > end:
            sys.exit("the server did not come up; look at its log")
        time.sleep(0.5)


def enrolled(server: Mapping[str, str], work: Path, number: int) -> dict[str, str]:
    """A new device's environment, once the server knows its key."""
    device = home(work / f"device-{number}")
    token = asked(server, "server", "create-token", f"device-{number}").strip().splitlines()[-1]
    command = [*FEDTUNE, "device", "enrol", "--token", "-"]
    subprocess.run(command, env=device, check=True, input=token, text=True)
    return device


def join(work: Path, device: Mapping[str, str], number: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    return background(device, work / f"device-{number}.log", "device", "join", "--data", f"partition:{number}")


@contextmanager
def watched(server: Mapping[str, str]) -> Iterator[Iterator[str]]:
    """The lines of a submitted run, as they come."""
    words = ("submit", str(RECIPE), "--watch")
    print(f"\n$ fedtune {' '.join(words)}", flush=True)
    with subprocess.Popen([*FEDTUNE, *words], env=server, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield iter(process.stdout)


if __name__ == "__main__":
    main()
