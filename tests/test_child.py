"""Child processes import what is installed, whatever lies in the folder they are started in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.child import environment, isolated
from fedtune.device.channel import Frame
from fedtune.device.keeper import Keeper
from fedtune.server.superlink import SuperLink

OURS = ("clients", "fedtune", "server", "migrations")
THEIRS = ("json.py", "torch.py", "flwr.py", "socket.py")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder holds modules that leave a mark when they are imported; the mark."""
    folder, mark = tmp_path / "trap", tmp_path / "imported"
    text = f"open({str(mark)!r}, 'a').write(__name__)\nraise SystemExit\n"
    for name in [*(f"{package}/__init__.py" for package in OURS), *THEIRS]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return mark


def test_the_trap_catches_a_child_that_is_not_isolated(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # the command line sets it for all that it starts
    subprocess.run([sys.executable, "-m", "fedtune.device.trainer"], capture_output=True, check=False)
    assert trap.exists()


@pytest.mark.parametrize("entries", ["", os.pathsep, f"{os.pathsep}/nowhere{os.pathsep}"])
def test_an_isolated_child_and_its_own_children_import_nothing_of_it(
    trap: Path, monkeypatch: pytest.MonkeyPatch, entries: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", entries)
    code = "import fedtune.device, fedtune.server, json; print(fedtune.__file__)"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    for command in ([*isolated("json.tool"), "--help"], [sys.executable, "-c", grandchild]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not trap.exists()


@pytest.mark.slow
def test_a_devices_trainer_imports_nothing_of_the_working_folder(trap: Path, home: Path) -> None:
    keeper = Keeper("part:0", 1 << 34, 60.0)
    try:
        answer = keeper.ask(Frame({"recipe": "{}"}))
    finally:
        keeper.close()
    assert answer.header["kind"] == "failed"  # it is there, and was asked something it does not know
    assert not trap.exists()


@pytest.mark.slow
def test_a_servers_processes_import_nothing_of_the_working_folder(trap: Path, tmp_path: Path) -> None:
    superlink = SuperLink(tmp_path / "flower")
    try:
        superlink.start()
        assert superlink.executes()
    finally:
        superlink.close()
    assert not trap.exists()


def test_a_socket_whose_path_would_be_too_long_lies_in_a_private_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    superlink = SuperLink(folder)
    assert len(str(superlink.socket)) < 100
    assert superlink.socket.parent.stat().st_mode & 0o777 == 0o700
    superlink.close()
    assert not superlink.socket.parent.exists()
