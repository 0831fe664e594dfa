"""Flower as it comes, on this machine: a SuperLink, SuperNodes and an app whose clients import torch and send back.

The yardstick for what a phase costs beyond training, and for what an idle node holds.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fedtune.flower.child_processes import find_free_port, make_child_environment, stop_process_group

__all__ = ["Stock", "stock"]

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "stock"
version = "1.0.0"
description = "a train phase and nothing else"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "stock.server_app:app"
clientapp = "stock.client_app:app"

[tool.flwr.app.config]
rounds = 1
nodes = 1
told = ""
"""
_SERVER = """\
import json, time
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    array = Array("uint8", (31400,), "numpy.ndarray", bytes(31400))
    for _ in range(config["rounds"]):
        state = RecordDict({"state": ArrayRecord({"w": array})})
        nodes, started = list(grid.get_node_ids()), time.monotonic()
        replies = list(grid.send_and_receive([Message(state, node, "train") for node in nodes], timeout=300))
        seconds = time.monotonic() - started
        with open(config["told"], "a") as told:
            trained = [reply.content["report"]["seconds"] for reply in replies]
            print(json.dumps({"seconds": seconds, "trained": trained}), file=told, flush=True)
"""
_CLIENT = """\
import time
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    started = time.monotonic()
    weights = torch.zeros(31400)
    report = MetricRecord({"seconds": time.monotonic() - started})
    return Message(RecordDict({"state": message.content["state"], "report": report}), reply_to=message)
"""


class Stock:
    """A SuperLink and so many SuperNodes below ``folder``."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self._folder, self._nodes, self.port = folder, nodes, find_free_port()
        self._environment = make_child_environment(folder / "flwr")
        (folder / "flwr").mkdir(parents=True)
        address = f"127.0.0.1:{self.port}"
        (folder / "flwr" / "config.toml").write_text(f'[superlink.lo]\naddress = "{address}"\ninsecure = true\n')
        app = {"pyproject.toml": _PROJECT, "stock/server_app.py": _SERVER, "stock/client_app.py": _CLIENT}
        for name, text in app.items():
            path = folder / "app" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folder / "app" / "stock" / "__init__.py").touch()
        database = str(folder / "superlink.sqlite")
        settings = ("--database", database, "--disable-runtime-dependency-installation")
        self._processes = [self._start("superlink", "--port", str(self.port), *settings)]
        time.sleep(10)
        self.supernodes = [
            self._start("supernode", "--superlink", address, "--port", str(find_free_port())) for _ in range(nodes)
        ]
        self._processes += self.supernodes

    def rounds(self, count: int) -> list[dict[str, Any]]:
        """Seconds of so many train phases, and of what their clients did in them."""
        told = self._folder / "told"
        config = f'rounds={count} nodes={self._nodes} told="{told}"'
        command = ["flwr", "run", str(self._folder / "app"), "lo", "--stream", "--run-config", config]
        subprocess.run(command, env=self._environment, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in told.read_text().splitlines()]

    def idle_node(self) -> dict[str, int]:
        """Bytes a waiting node holds, as proportional set sizes: its SuperNode, and the SuperExec beside it."""
        own = psutil.Process(self.supernodes[0].pid)
        beside = sum(child.memory_full_info().pss for child in own.children(recursive=True))
        return {"SuperNode": own.memory_full_info().pss, "SuperExec": beside}

    def close(self) -> None:
        """End all of it."""
        for process in reversed(self._processes):
            family = psutil.Process(process.pid).children(recursive=True)
            stop_process_group(process, 5.0)
            for child in family:
                if child.is_running():
                    child.kill()

    def _start(self, what: str, *words: str) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{what}.log").open("ab") as log:
            return subprocess.Popen(
                [f"flower-{what}", "--insecure", *words],
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


@contextmanager
def stock(folder: Path, nodes: int) -> Iterator[Stock]:
    """Flower as it comes, for as long as the block lasts."""
    running = Stock(folder, nodes)
    try:
        yield running
    finally:
        running.close()
