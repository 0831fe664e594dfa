"""Child processes import what is installed, whatever lies in the folder they are started in."""

import fcntl
import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.child_processes import environment, make_isolated_command, wait_until_readable
from fedtune.device.device_home import DeviceHome, DeviceIdentity
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.flower.superlink import SuperLink
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.certificate_authority import generate_private_key, make_ca_certificate
from fedtune.server.recipe_check_process import RecipeCheckProcess
from tests.federations import TRIVIAL, WORDS, outcome, words
from tests.servers import serving

COMMAND = str(Path(sys.executable).parent / "fedtune")
"""What a shell starts."""
RAY = importlib.util.find_spec("ray") is not None

OURS = ("clients", "fedtune", "server", "migrations")
THEIRS = ("json.py", "torch.py", "flwr.py", "ray.py", "socket.py", "yaml.py", "clients.py", "fedtune.py", "server.py")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder holds modules that leave a mark when they are imported; the mark."""
    folder, mark = tmp_path / "trap", tmp_path / "imported"
    text = f"open({str(mark)!r}, 'a').write(__name__)\nraise SystemExit\n"
    for name in [*(f"{package}/__init__.py" for package in OURS), *THEIRS]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # the command line sets it for all that it starts
    return mark


def test_the_trap_catches_a_child_that_is_not_isolated(trap: Path) -> None:
    subprocess.run([sys.executable, "-m", "fedtune.device.trainer"], capture_output=True, check=False)
    assert trap.exists()


@pytest.mark.parametrize("entries", ["", os.pathsep, f"{os.pathsep}/nowhere{os.pathsep}"])
def test_an_isolated_child_and_its_own_children_import_nothing_of_it(
    trap: Path, monkeypatch: pytest.MonkeyPatch, entries: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", entries)
    code = "import fedtune.device, fedtune.server, json; print(fedtune.__file__)"
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    for command in ([*make_isolated_command("json.tool"), "--help"], [sys.executable, "-c", grandchild]):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not trap.exists()


@pytest.mark.slow
def test_a_devices_trainer_imports_nothing_of_the_working_folder(trap: Path, home: Path) -> None:
    keeper = TrainerSupervisor("partition:0", 1 << 34, 60.0)
    try:
        answer = keeper.run_request(Frame({"recipe": "{}"}))
    finally:
        keeper.stop_trainer()
    assert answer.header["kind"] == "failed"  # it is there, and was asked something it does not know
    assert not trap.exists()


@pytest.mark.slow
def test_a_servers_processes_import_nothing_of_the_working_folder(trap: Path, tmp_path: Path) -> None:
    superlink = SuperLink(tmp_path / "flower")
    try:
        superlink.start()
        assert superlink.is_superexec_alive()
    finally:
        superlink.close()
    assert not trap.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "2"),
        pytest.param(
            ("--engine", "flower"), marks=[pytest.mark.skipif(not RAY, reason="it needs ray"), pytest.mark.deployed]
        ),
    ],
)
def test_a_simulation_imports_nothing_of_the_folder_by_which_its_paths_go(
    trap: Path, home: Path, options: tuple[str, ...]
) -> None:
    words(Path())
    Path("recipe.yaml").write_text(WORDS.format(folder=".").replace("rounds: 2", "rounds: 1"), encoding="utf-8")
    done = simulate("recipe.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert not trap.exists()
    assert [record.status for record in outcome().rounds] == ["completed", "completed"]


def simulate(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([COMMAND, "simulate", *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_server_that_is_up_imports_nothing_of_the_working_folder(trap: Path, home: Path) -> None:
    home.mkdir()
    with serving(home, program=[COMMAND]) as server:
        assert server.knock("GET", "/health").status_code == 200, "Flower's own processes run too"
    assert not trap.exists()


@pytest.mark.slow
def test_a_device_that_joins_imports_nothing_of_the_working_folder(trap: Path, home: Path) -> None:
    place = DeviceHome()
    place.create_key()
    place.save_identity(
        DeviceIdentity("https://127.0.0.1:1", "pi", 7, make_ca_certificate(generate_private_key()).decode())
    )
    command = [COMMAND, "device", "join", "--data", "partition:0", "--memory", "1GB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = next((line for line in process.stdout if "cannot be reached" in line), "")
        process.kill()
    assert said, "it did not come to its work"
    assert not trap.exists()


@pytest.mark.slow
def test_a_server_checks_recipes_without_the_working_folder(trap: Path) -> None:
    check = RecipeCheckProcess()
    try:
        assert check.check_recipe(parse_recipe(TRIVIAL, "trivial", [])).name == "trivial"
    finally:
        check.close()
    assert not trap.exists()


def test_a_socket_whose_path_would_be_too_long_lies_in_a_private_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    superlink = SuperLink(folder)
    assert len(str(superlink.socket)) < 100
    assert superlink.socket.parent.stat().st_mode & 0o777 == 0o700
    superlink.close()
    assert not superlink.socket.parent.exists()


@pytest.fixture
def many_files() -> Iterator[int]:
    """A descriptor number that ``select.select`` refuses, as a process with many connections has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(hard, 4096), hard))
    yield 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_stream_with_a_high_descriptor_number_is_waited_for(many_files: int) -> None:
    reading, writing = os.pipe()
    high = fcntl.fcntl(reading, fcntl.F_DUPFD, many_files)
    with os.fdopen(high) as stream:
        assert not wait_until_readable(stream, 0.01)
        os.write(writing, b"x")
        assert wait_until_readable(stream, 0.01)
        assert stream.read(1) == "x"
        os.close(writing)
        assert wait_until_readable(stream, 10.0)  # the other end is closed
    os.close(reading)
