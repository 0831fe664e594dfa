"""Flower's own engine: the same apps through ``flwr run``, on a SuperLink and Ray actors that end with the run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from fedtune import home
from fedtune.errors import RoundError
from fedtune.files import write
from fedtune.recipe import Recipe
from fedtune.tracking import Store
from server.watch import RoundEnded, RunStarted, tell

__all__ = ["run_flower"]

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtune-on-flower"
version = "1.0.0"
description = "fedtune's apps, as installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "fedtune_on_flower.server_app:app"
clientapp = "fedtune_on_flower.client_app:app"

[tool.flwr.app.config]
run = ""
store = ""
home = ""
"""
_START_SECONDS = 60.0
_POLL_SECONDS = 0.5


def run_flower(recipe: Recipe, run: str, store: str) -> None:
    """Execute a run that the store holds on Flower's engine; RoundError when Flower says that it failed."""
    if shutil.which("flower-superlink", path=_path()) is None:
        raise RoundError("Flower's commands are not installed; pip install 'fedtune[ray]' or use --engine local")
    with tempfile.TemporaryDirectory(prefix="fedtune-flower-") as folder:
        where = Path(folder)
        port = _free_port()
        environment = _environment(where)
        _write_app(where, port, {"run": run, "store": store, "home": str(home.home())})
        with _superlink(where, port, environment):
            _submit(where, recipe, run, store, environment)


def _path() -> str:
    """The commands beside this interpreter first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(where: Path) -> dict[str, str]:
    """Nothing is looked up, reported or installed; workers find the packages this process finds."""
    return {
        **os.environ,
        "PATH": _path(),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "FLWR_HOME": str(where / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _write_app(where: Path, port: int, config: Mapping[str, str]) -> None:
    """A thin Flower app that names the installed one, its settings, and the address of our SuperLink."""
    package = where / "app" / "fedtune_on_flower"
    write(package / "__init__.py", b"")
    write(package / "server_app.py", b'from server.app import app\n\n__all__ = ["app"]\n')
    write(package / "client_app.py", b'from clients.app import app\n\n__all__ = ["app"]\n')
    write(where / "app" / "pyproject.toml", _PROJECT.encode())
    write(where / "run.toml", "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()).encode())
    address = f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    write(where / "home" / "config.toml", address.encode())


@contextmanager
def _superlink(where: Path, port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A SuperLink on the loopback address, in a process group of its own that ends with the block."""
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (where / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_up(process, port, where / "superlink.log")
            yield
        finally:
            _end(process)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RoundError(f"Flower's SuperLink did not start: {_last_line(log)}; try again or use --engine local")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: SuperLink, server process and Ray."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _submit(where: Path, recipe: Recipe, run: str, store: str, environment: Mapping[str, str]) -> None:
    """Run to the end while passing on the rounds that land in the store; Flower's own listing tells how it ended."""
    resources = f"num-supernodes={recipe.clients} client-resources-num-cpus={recipe.train.threads}"
    options = ["--federation-config", resources, "--run-config", str(where / "run.toml"), "--stream"]
    log = where / "run.log"
    with log.open("wb") as file, Store.open(store) as opened:
        first = len(opened.rounds(run))
        tell(RunStarted(run, max(1, first), recipe.federation.rounds))
        command = ["flwr", "run", str(where / "app"), "own", *options]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            _follow(process, opened, run, first)
        finally:
            process.kill()
            process.wait()
    listed = subprocess.run(
        ["flwr", "ls", "own", "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    if "finished:completed" not in listed.stdout:
        with Store.open(store) as opened:
            reason = opened.run(run).reason or _last_line(log)
        raise RoundError(f"Flower's engine ended without completing the run: {reason}")


def _follow(process: subprocess.Popen[bytes], store: Store, run: str, seen: int) -> None:
    while True:
        ended = process.poll() is not None
        rounds = store.rounds(run)
        for record in rounds[seen:]:
            tell(RoundEnded(record))
        seen = len(rounds)
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
