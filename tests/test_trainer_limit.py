"""Control groups for trainers, on a tree of files that stands for the kernel's; scopes, by a program that stands for
systemd-run.
"""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.device import trainer_limit
from fedtune.device.cgroups import Cgroup, CgroupError, CgroupTree
from fedtune.device.device_profile import make_device_profile
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_limit import GroupLimit, ProcessLimit, ScopeLimit, TrainerLimit, choose_trainer_limit
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import DeviceError
from fedtune.server.profile import read_profile

MB = 10**6
USER = 1000


class FakeGroup(Cgroup):
    """A group that is filled with files as the kernel does: with memory's if the parent hands memory down."""

    def make_folder(self) -> None:
        if self.path.exists():
            return
        super().make_folder()
        fill(self.path, (self.path.parent / "cgroup.subtree_control").read_text())

    def remove(self) -> None:
        for file in self.path.iterdir() if self.path.exists() else ():
            file.unlink()
        super().remove()


class FakeTree(CgroupTree):
    """A tree in a folder."""

    def open_group(self, path: Path, limit: int) -> Cgroup:
        return FakeGroup(path, limit)


def fill(path: Path, controllers: str, *, subtree: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    files = {"cgroup.controllers": controllers, "cgroup.subtree_control": subtree, "cgroup.procs": ""}
    files["cgroup.type"] = "domain"
    if "memory" in controllers:
        files |= {"memory.max": "max", "memory.swap.max": "max", "memory.events": "low 0\noom 0\noom_kill 0\n"}
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def a_tree(folder: Path, own: str = "own", *, uid: int = USER) -> FakeTree:
    """A machine whose group has all controllers, with this process in the group ``own``."""
    root = fill(folder / "cgroup", "cpu memory pids", subtree="cpu memory pids")
    (root / "cgroup.type").unlink()
    (folder / "membership").write_text(f"1:cpu:/old\n0::/{own}\n")
    return FakeTree(root, folder / "membership", uid)


def test_a_delegated_group_is_divided_and_the_device_moves_to_a_leaf(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "cpu memory")
    group = tree.make_limited(512 * MB)
    assert (own / "fedtune-device" / "cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    assert group.path == own / f"fedtune-trainer-{os.getpid()}"
    assert (group.path / "memory.max").read_text() == str(512 * MB)
    assert (group.path / "memory.swap.max").read_text() == "0"
    (tmp_path / "membership").write_text("0::/own/fedtune-device\n")
    assert tree.make_limited(100 * MB).path == group.path  # the next device process, in the leaf of the first


def test_a_group_that_hands_memory_down_already_is_used_as_it_is(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "memory", subtree="memory")
    assert tree.make_limited(512 * MB).path.parent == own
    assert not (own / "fedtune-device").exists()


def test_a_group_with_other_processes_is_left_as_it_was(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "memory")
    (own / "cgroup.subtree_control").unlink()
    (own / "cgroup.subtree_control").mkdir()  # reading and writing it fail
    with pytest.raises(CgroupError, match="own cannot be divided"):
        tree.make_limited(512 * MB)
    assert not (own / "fedtune-device").exists()


def test_a_device_that_cannot_divide_its_group_returns_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = a_tree(tmp_path)
    own, real = fill(tree.root / "own", "memory"), Path.write_text

    def refuse(self: Path, text: str) -> int:
        if text == "+memory":
            raise OSError(16, "Device or resource busy")
        return real(self, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CgroupError, match=r"own cannot be divided \(Device or resource busy\)"):
        tree.make_limited(512 * MB)
    assert (own / "cgroup.procs").read_text() == str(os.getpid())
    assert not (own / "fedtune-device").exists()


def test_root_makes_a_group_of_the_machine_where_its_own_is_no_use(tmp_path: Path) -> None:
    tree = a_tree(tmp_path, uid=0)
    fill(tree.root / "own", "cpu")
    assert tree.make_limited(512 * MB).path.parent == tree.root
    assert (tree.root / "cgroup.subtree_control").read_text() == "cpu memory pids"
    with pytest.raises(CgroupError, match=r"memory controller is not delegated to .*own"):
        a_tree(tmp_path).make_limited(512 * MB)


def test_every_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CgroupError, match="no control groups of version 2"):
        FakeTree(tmp_path / "none", tmp_path / "membership", 0).make_limited(MB)
    tree = a_tree(tmp_path, "gone")
    with pytest.raises(CgroupError, match=r"gone cannot be divided \(No such file"):
        tree.make_limited(MB)
    (tmp_path / "membership").write_text("4:memory:/old\n")
    with pytest.raises(CgroupError, match="no control groups of version 2"):
        tree.make_limited(MB)
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "memory", subtree="memory")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CgroupError, match=r"may not make groups in .*own"):
        tree.make_limited(MB)
    monkeypatch.undo()
    monkeypatch.setattr(FakeGroup, "make_folder", lambda self: self.path.mkdir(exist_ok=True))
    with pytest.raises(CgroupError, match=r"has no memory\.max"):
        tree.make_limited(MB)
    (own / f"fedtune-trainer-{os.getpid()}" / "memory.max").mkdir()
    with pytest.raises(CgroupError, match="cannot be limited"):
        tree.make_limited(MB)


@pytest.mark.parametrize(
    ("kept", "holds"), [("512000000", True), ("511995904", True), ("max", False), ("1000", False), ("512000001", False)]
)
def test_a_limit_counts_only_if_the_kernel_kept_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, holds: bool
) -> None:
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a: kept if self.name == "memory.max" else real(self, *a))
    tree = a_tree(tmp_path)
    fill(tree.root / "own", "memory", subtree="memory")
    if holds:
        assert tree.make_limited(512 * MB)
    else:
        with pytest.raises(CgroupError, match=r"does not keep its memory\.max"):
            tree.make_limited(512 * MB)


def test_groups_of_devices_that_were_killed_are_removed(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "memory", subtree="memory")
    dead, alive = fill(own / "fedtune-trainer-999999999", "memory"), fill(own / f"fedtune-trainer-{os.getppid()}", "")
    group = tree.make_limited(MB)
    assert (dead.exists(), alive.exists(), group.path.exists()) == (False, True, True)
    group.remove()
    assert not group.path.exists()


def test_the_kernel_s_count_of_kills_is_compared_with_that_at_the_start(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    fill(tree.root / "own", "memory", subtree="memory")
    group = tree.make_limited(MB)
    (group.path / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert group.has_killed()
    group.apply_limit()
    assert not group.has_killed()
    (group.path / "memory.events").unlink()
    assert not group.has_killed()


def test_a_command_runs_inside_its_group_as_the_same_process(tmp_path: Path) -> None:
    tree = a_tree(tmp_path)
    fill(tree.root / "own", "memory", subtree="memory")
    group = tree.make_limited(MB)
    command = GroupLimit(group).wrap_command([sys.executable, "-c", "import os; print(os.getpid(), 'a b')", "x y"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.communicate()[0].split()
    assert said == [str(process.pid), "a", "b"]
    assert (group.path / "cgroup.procs").read_text().split() == [str(process.pid)]


def test_nothing_runs_if_the_group_cannot_be_joined(tmp_path: Path) -> None:
    group = Cgroup(tmp_path / "none" / "group", MB)
    done = subprocess.run(GroupLimit(group).wrap_command(["echo", "ran"]), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""


SYSTEMD_RUN = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != "--" ]; do shift; done
shift
{body}
"""


def a_systemd_run(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    program, log = folder / "bin" / "systemd-run", folder / "asked"
    program.parent.mkdir()
    program.write_text(SYSTEMD_RUN.format(log=log, body=body))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return log


def test_a_scope_is_taken_where_the_limit_is_found_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = a_systemd_run(tmp_path, monkeypatch, "echo 511995904")
    monkeypatch.setattr(os, "geteuid", lambda: USER)
    limit = choose_trainer_limit(512 * MB, tree=FakeTree(tmp_path, tmp_path, USER))
    assert isinstance(limit, ScopeLimit)
    asked = log.read_text()
    assert asked.startswith("--user --scope --quiet --collect -p MemoryMax=512000000 -p MemorySwapMax=0 -- /bin/sh -c")
    assert "memory.max" in asked
    assert (limit.has_killed(500 * MB), limit.has_killed(300 * MB)) == (True, False)
    limit.close()


@pytest.mark.parametrize("body", ["echo max", "echo 512000001", "exit 1", "echo", "sleep 60"])
def test_a_scope_without_the_limit_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(trainer_limit, "_PROBE_SECONDS", 0.5)
    a_systemd_run(tmp_path, monkeypatch, body.replace("sleep", "exec sleep"))
    tree = FakeTree(tmp_path, tmp_path, USER)
    limit = choose_trainer_limit(512 * MB, tree=tree)
    assert isinstance(limit, ProcessLimit)
    assert limit.name == "rlimit"
    assert "no control groups of version 2; to get one, run the device as the unit" in limit.sentence
    with pytest.raises(DeviceError, match=r"^--memory-limit cgroup: this system has no .* systemd-run --user --scope"):
        choose_trainer_limit(512 * MB, "cgroup", tree)


def test_a_device_says_which_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = a_tree(tmp_path)
    fill(tree.root / "own", "memory", subtree="memory")
    found = choose_trainer_limit(512 * MB, tree=tree)
    assert (found.name, found.sentence) == (
        "cgroup",
        f"the control group {tree.root}/own/fedtune-trainer-{os.getpid()}",
    )
    plain = choose_trainer_limit(512 * MB, "process", tree)
    assert (plain.name, plain.sentence) == ("rlimit", "RLIMIT_DATA and a watchdog")
    assert '"memory_limit": "cgroup"' in read_profile(make_device_profile(512 * MB, "cgroup"), "dev")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert (ProcessLimit().name, "this system limits no private memory" in ProcessLimit().sentence) == (
        "watchdog",
        True,
    )


def test_an_unknown_limit_is_refused() -> None:
    done = CliRunner().invoke(cli, ["device", "join", "--data", "partition:0", "--memory-limit", "ulimit"])
    assert done.exit_code == 2
    assert "'auto', 'cgroup', 'process'" in done.stderr


class Kernel:
    """A limit that ends the trainer for its memory at once, when it starts to train, or not at all."""

    name, sentence = "cgroup", "a kernel"

    def __init__(self, *, says: bool) -> None:
        self.says, self.closed = says, False

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]

    def has_killed(self, held: int) -> bool:
        return self.says

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def supervisors() -> Iterator[list[TrainerSupervisor]]:
    made: list[TrainerSupervisor] = []
    yield made
    for one in made:
        one.stop_trainer()


@pytest.mark.parametrize(("says", "code"), [(True, "memory-model"), (False, "trainer-killed")])
def test_a_trainer_that_the_kernel_ends_for_its_memory_declines(
    supervisors: list[TrainerSupervisor], says: bool, code: str
) -> None:
    limit = Kernel(says=says)
    supervisors.append(TrainerSupervisor("partition:0", 512 * MB, 60.0, limit))
    ended = supervisors[0].run_request(Frame({"recipe": "{}", "round": 1, "client": 0}))
    assert ended.header["kind"] == ("declined" if says else "died")
    assert ended.header["problem"].startswith(code)
    supervisors[0].close()
    assert limit.closed


TRAINER = """
import socket, sys
from fedtune.device.trainer_channel import Frame, TrainerChannel
channel = TrainerChannel(socket.socket(fileno=int(sys.argv[-4])))
channel.receive()
channel.send(Frame({"kind": "fits"}))
if int(sys.argv[-1]) < 2:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
channel.send(Frame({"kind": "trained", "halvings": int(sys.argv[-1])}))
channel.receive()
"""


class StepKernel(Kernel):
    """It ends the trainer while it trains, until the batch was halved twice."""

    def wrap_command(self, command: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", TRAINER, *command[-4:]]


def test_a_trainer_that_the_kernel_ends_in_a_step_starts_again_with_half_the_batch(
    supervisors: list[TrainerSupervisor],
) -> None:
    limit: TrainerLimit = StepKernel(says=True)
    supervisors.append(TrainerSupervisor("partition:0", 512 * MB, 60.0, limit))
    ended = supervisors[0].run_request(Frame({"recipe": "{}", "round": 1, "client": 0}))
    assert ended.header == {"kind": "trained", "halvings": 2}


def test_a_killed_process_leaves_the_group_of_its_trainer_and_the_next_removes_it(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    tree = a_tree(tmp_path)
    own = fill(tree.root / "own", "memory", subtree="memory")
    left = fill(own / f"fedtune-trainer-{child.pid}", "memory")
    tree.make_limited(MB)
    assert left.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    tree.make_limited(MB)
    assert not left.exists()
