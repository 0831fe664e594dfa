"""Where a deployed round stands, seen from outside: in the files of a device and of the server, and in the store."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.fleet import Fleet, Member
from fedtune.device.device_home import DeviceHome
from fedtune.tracking import Store

__all__ = ["PHASES", "VICTIMS", "Watch", "process_of"]

PHASES = ("sending", "training", "returning", "merging", "committing")
VICTIMS = {
    "device": "device join",
    "trainer": "fedtune.device.trainer",
    "ServerApp": "fedtune.flower.app_child",
    "SuperExec": "fedtune.flower.superexec_child",
    "SuperLink": "fedtune.flower.superlink_child",
    "door": "server up",
}
"""What is killed, by words of its command line. A device's own process is Flower's SuperNode and ClientApp in one."""


@dataclass(frozen=True)
class Watch:
    """A run on a fleet as one device and the server see it."""

    made: Fleet
    store: Store
    run: str

    def committed(self) -> int:
        """The last round in the store; -1 before round 0."""
        rounds = self.store.rounds(self.run)
        return rounds[-1].number if rounds else -1

    def at(self, phase: str, number: int) -> bool:
        """Whether round ``number`` is in a phase now."""
        device = DeviceHome(self.made.devices[0].home / "device")
        match phase:
            case "sending":
                return not (device.folder / "order").exists() and not self._spooled(number) and self._is_next(number)
            case "training":
                noted = device.read_status()
                training = noted.get("state") == "training" and noted.get("round") == number
                return training and not (device.folder / "answer").exists()
            case "returning":
                return (device.folder / "answer").exists() and self._is_next(number)
            case "merging":
                return self._spooled(number) == len(self.made.devices) and not self._checkpoint(number)
            case _:
                return self._checkpoint(number) and self._is_next(number)

    @property
    def folder(self) -> Path:
        """Checkpoints of the run, and its spool."""
        return self.made.server.home / "runs" / self.run

    def _is_next(self, number: int) -> bool:
        return self.committed() == number - 1

    def _spooled(self, number: int) -> int:
        return len(list((self.folder / f"round-{number:04d}.spool").glob("client-*.safetensors")))

    def _checkpoint(self, number: int) -> bool:
        return any(self.folder.glob(f"*round-{number:04d}.safetensors*"))


def process_of(made: Fleet, victim: str) -> psutil.Process | None:
    """The victim's process: the server's, or the first device's."""
    member: Member = made.devices[0] if victim in ("device", "trainer") else made.server
    for process in member.below():
        try:
            if VICTIMS[victim] in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None
