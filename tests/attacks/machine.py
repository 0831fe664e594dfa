"""Attacks by another user of the server's machine, and by what lies in the folder a device is started in."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from tests.attacks.scene import Attack, Scene

__all__ = ["ATTACKS"]

_AS_NOBODY = """
import os, socket, ssl, sys
import httpx
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.runtime import RuntimeHttpClient

CALLS = ((ControlHttpClient, lambda client: client.StartRun(StartRunRequest())),
         (RuntimeHttpClient, lambda client: client.AcquireTask(AcquireTaskRequest())))

def call(kind, made, address, trust):
    try:
        with kind(address, verify=trust) as client:
            made(client)
        return "taken"
    except httpx.HTTPStatusError as error:
        return str(error.response.status_code)
    except httpx.HTTPError as error:
        return repr(error)

ca, unix, *ports = sys.argv[1:]
trust = ssl.create_default_context(cafile=ca)
for kind, made in CALLS:  # what is imported late is imported now: another user may not be able to read it
    call(kind, made, "https://localhost:1", trust)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
line = socket.socket(socket.AF_UNIX)
try:
    line.connect(unix)
    print("connected")
except PermissionError:
    print("denied")
for port in ports:
    for kind, made in CALLS:
        print(call(kind, made, f"https://localhost:{port}", trust))
"""


def _not_root() -> str:
    return "" if os.geteuid() == 0 else "only root can become another user"


def _another_user(scene: Scene) -> str:
    """A process of uid 65534 tries the SuperLink's socket, and Control and Runtime calls at every port there is."""
    ca = scene.folder / "ca.pem"
    ca.write_text(scene.server.place.ca_file.read_text())
    os.chmod(scene.folder, 0o755)
    own = psutil.Process(scene.server.process.pid)
    ports = set()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            ports |= {one.laddr.port for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    assert ports == {scene.server.place.settings.address[1]}, f"more than the door has a port: {ports}"
    unix = scene.server.place.flower_home / "superlink.sock"
    command = [sys.executable, "-P", "-c", _AS_NOBODY, str(ca), str(unix), *map(str, ports)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.split() == ["denied", "404", "404"], done.stdout + done.stderr
    return "socket denied; StartRun and AcquireTask at the door: 404"


def _files(scene: Scene) -> str:
    """No file of the server's home that holds a secret can be read by others."""
    home = scene.server.place.folder
    assert home.stat().st_mode & 0o077 == 0
    for path in (home / "ca.key", home / "server.key", home / "operator.json"):
        assert path.stat().st_mode & 0o077 == 0, path
    return "keys are the owner's alone"


def _arguments(scene: Scene) -> str:
    """What everybody can see of processes, their arguments, holds no secret."""
    own = psutil.Process(scene.server.process.pid)
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            assert "--token" not in process.cmdline(), process.cmdline()
    return "no token in any argument"


def _planted_modules(scene: Scene) -> str:
    """A device's trainer is started in a folder where somebody left modules with our names and torch's."""
    trap, mark = scene.folder / "trap", scene.folder / "imported"
    for name in ("clients/__init__.py", "fedtune/__init__.py", "server/__init__.py", "torch.py", "json.py"):
        (trap / name).parent.mkdir(parents=True, exist_ok=True)
        (trap / name).write_text(f"open({str(mark)!r}, 'a').write(__name__)\nraise SystemExit\n")
    before = Path.cwd()
    os.chdir(trap)
    keeper = TrainerSupervisor("partition:0", 1 << 34, 60.0)
    try:
        assert keeper.run_request(Frame({"recipe": "{}"})).header["kind"] == "failed"
    finally:
        keeper.stop_trainer()
        os.chdir(before)
    assert not mark.exists(), mark.read_text()
    return "the trainer imports what is installed"


ATTACKS = [
    Attack("another user of the machine calls the SuperLink", _another_user, "POST /v1/control/start-run", _not_root),
    Attack("another user reads the server's keys", _files, ""),
    Attack("another user reads secrets in arguments", _arguments, ""),
    Attack("modules planted in the folder a device is started in", _planted_modules, ""),
]
