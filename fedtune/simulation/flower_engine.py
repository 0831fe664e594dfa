"""Flower's own engine: the same apps through ``flwr run``, on a SuperLink and Ray actors that end with the run."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from fedtune import home
from fedtune.errors import RoundError
from fedtune.files import write
from fedtune.recipe import Recipe
from fedtune.tracking import Store
from server import thin_app
from server.flower_process import end_group, environment, free_port, last_line, path
from server.watch import RoundEnded, RunStarted, tell

__all__ = ["run_flower"]

_START_SECONDS = 60.0
_POLL_SECONDS = 0.5


def run_flower(recipe: Recipe, run: str, store: str) -> None:
    """Execute a run that the store holds on Flower's engine; RoundError when Flower says that it failed."""
    if shutil.which("flower-superlink", path=path()) is None:
        raise RoundError("Flower's commands are not installed; pip install 'fedtune[ray]' or use --engine local")
    with tempfile.TemporaryDirectory(prefix="fedtune-flower-") as folder:
        where = Path(folder)
        port = free_port()
        settings = environment(where / "home")
        _write_app(where, port, {"run": run, "store": store, "home": str(home.home())})
        with _superlink(where, port, settings):
            _submit(where, recipe, run, store, settings)


def _write_app(where: Path, port: int, config: Mapping[str, str]) -> None:
    """A thin Flower app that names the installed one, its settings, and the address of our SuperLink."""
    for name, content in thin_app.files().items():
        write(where / "app" / name, content)
    settings = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items())
    write(where / "run.toml", settings.encode())
    address = f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    write(where / "home" / "config.toml", address.encode())


@contextmanager
def _superlink(where: Path, port: int, settings: Mapping[str, str]) -> Iterator[None]:
    """A SuperLink on the loopback address, in a process group of its own that ends with the block."""
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (where / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"],
            env=settings,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_up(process, port, where / "superlink.log")
            yield
        finally:
            end_group(process)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RoundError(f"Flower's SuperLink did not start: {last_line(log)}; try again or use --engine local")


def _submit(where: Path, recipe: Recipe, run: str, store: str, settings: Mapping[str, str]) -> None:
    """Run to the end while passing on the rounds that land in the store; Flower's own listing tells how it ended."""
    resources = f"num-supernodes={recipe.clients} client-resources-num-cpus={recipe.train.threads}"
    options = ["--federation-config", resources, "--run-config", str(where / "run.toml"), "--stream"]
    log = where / "run.log"
    with log.open("wb") as file, Store.open(store) as opened:
        last = max((record.number for record in opened.rounds(run)), default=-1)
        tell(RunStarted(run, max(1, last + 1), recipe.federation.rounds))
        command = ["flwr", "run", str(where / "app"), "own", *options]
        process = subprocess.Popen(command, env=settings, stdout=file, stderr=subprocess.STDOUT)
        try:
            _follow(process, opened, run, last)
        finally:
            process.kill()
            process.wait()
    listed = subprocess.run(
        ["flwr", "ls", "own", "--format", "json"], env=settings, capture_output=True, text=True, check=False
    )
    if "finished:completed" not in listed.stdout:
        with Store.open(store) as opened:
            reason = opened.run(run).reason or last_line(log)
        raise RoundError(f"Flower's engine ended without completing the run: {reason}")


def _follow(process: subprocess.Popen[bytes], store: Store, run: str, last: int) -> None:
    while True:
        ended = process.poll() is not None
        for record in store.rounds(run, last):
            tell(RoundEnded(record))
            last = record.number
        if ended:
            return
        time.sleep(_POLL_SECONDS)
