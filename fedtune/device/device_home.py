"""The files of a device below ``$FEDTUNE_HOME/device``: its identity, its key and the pending train request."""

import fcntl
import hashlib
import json
import os
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune import paths
from fedtune.device.memory_key import get_key_path
from fedtune.errors import DeviceError, StoreError
from fedtune.files import replace_file_atomically, write_bytes_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec  # a trainer, which needs folders alone, does not import it

__all__ = ["DeviceHome", "DeviceIdentity"]

_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class DeviceIdentity:
    """The URL of the server, and the device's name and node number. ``ca`` is the server's CA certificate as PEM."""

    url: str
    name: str
    node: int
    ca: str


class DeviceHome:
    """The folder of a device. It contains at most one identity."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or paths.get_home_folder() / "device"

    @property
    def is_enrolled(self) -> bool:
        """Whether the folder contains an identity."""
        return (self.folder / "identity.json").exists()

    def read_identity(self) -> DeviceIdentity:
        """Read the device's identity; raise DeviceError if it is not enrolled."""
        try:
            return _identity(json.loads((self.folder / "identity.json").read_text()))
        except FileNotFoundError as error:
            raise DeviceError(f"{self.folder} holds no device; enrol first: fedtune device enrol URL") from error
        except (ValueError, TypeError) as error:
            raise DeviceError(f"{self.folder}/identity.json is damaged; leave, and enrol with a new token") from error

    def save_identity(self, identity: DeviceIdentity) -> None:
        """Save the device's identity."""
        write_bytes_atomically(self.folder / "identity.json", json.dumps(asdict(identity), indent=2).encode())

    def create_key(self) -> "ec.EllipticCurvePrivateKey":
        """Create the private key, which only its owner can read, and return it. It never leaves this folder."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        key = ec.generate_private_key(ec.SECP384R1())
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_file_atomically(self._key) as beside:  # creates it with mode 0600
            beside.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return key

    def read_key(self) -> "ec.EllipticCurvePrivateKey":
        """Return the private key; raise DeviceError if it is missing, damaged or readable by other users."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            if self._key.stat().st_mode & 0o077:
                raise DeviceError(f"{self._key} can be read by other users; chmod 600 it")
            key = load_pem_private_key(self._key.read_bytes(), password=None)
        except (FileNotFoundError, ValueError) as error:
            raise DeviceError(f"{self._key} is missing or damaged; leave, and enrol with a new token") from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    @property
    def _key(self) -> Path:
        return self.folder / "key.pem"

    @contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Hold the lock of this device; raise DeviceError if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DeviceError(f"the device in {self.folder} is joined by another process; stop that one") from error
            yield

    @property
    def is_joined(self) -> bool:
        """Whether a process holds the lock of this device."""
        try:
            with self.hold_lock():
                return False
        except DeviceError:
            return True

    def write_status(self, state: dict[str, Any]) -> None:
        """Save what ``fedtune device status`` shows, without a flush to disk."""
        beside = self.folder / ".status.json.part"
        beside.write_text(json.dumps(state))
        os.replace(beside, self.folder / "status.json")

    def read_status(self) -> dict[str, Any]:
        """Read the last status; empty if there is none that can be read."""
        try:
            state = json.loads((self.folder / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def save_pending(self, what: str, *pieces: bytes) -> None:
        """Save the train request (``order``) or its result (``answer``), so that a killed device can continue."""
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        with replace_file_atomically(self.folder / what) as beside, beside.open("wb") as file:
            file.writelines([digest.digest(), *pieces])

    def read_pending(self, what: str) -> bytes | None:
        """Read the train request or the result that the last process saved; None if the file is missing or damaged.

        The server delivers a message again if the device does not have it, so a damaged file costs only time.
        """
        try:
            kept = (self.folder / what).read_bytes()
        except OSError:
            return None
        digest, content = kept[:_DIGEST], kept[_DIGEST:]
        return content if hashlib.sha256(content).digest() == digest else None

    def spool(self, state: bytes) -> Path:
        """Write the state of a train request to a file, which the trainer reads tensor by tensor.

        The file is not flushed to disk, because the device downloads the state again after a power failure. Raise
        StoreError if it cannot be written; no file is left then.
        """
        self.drop_state()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self._state, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(state)
        except OSError as error:
            self.drop_state()
            raise StoreError(f"cannot write {self._state}: {error.strerror}; free or choose another place") from error
        return self._state

    def drop_state(self) -> None:
        """Delete the state file. Errors of the disk are ignored."""
        with suppress(OSError):
            self._state.unlink()

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def clear_pending(self) -> bool:
        """Delete the saved train request and its result; return whether there was one."""
        self.drop_state()
        kept = [self.folder / what for what in ("answer", "order")]  # the result first; it must not stay
        found = any(path.exists() for path in kept)
        for path in kept:
            path.unlink(missing_ok=True)
        return found

    def get_local_state_folder(self, run: str) -> Path:
        """Return the folder of the device's local state in a run. Its name is a hash: the id comes from the server."""
        return self.folder / "own" / hashlib.sha256(run.encode()).hexdigest()[:32]

    def delete_run(self, run: str) -> None:
        """Delete the local state of a run, the key of its memory first; DeviceError if there is none."""
        folder = self.get_local_state_folder(run)
        if not folder.is_dir():
            raise DeviceError(f"{self.folder} holds nothing of a run {run}; give the whole id of the run")
        get_key_path(folder).unlink(missing_ok=True)
        shutil.rmtree(folder)

    def delete_all(self) -> None:
        """Delete the identity, the keys and the local state; the keys of memories first, so that they are worthless."""
        for key in get_key_path(self.get_local_state_folder("")).parent.glob("*.key"):
            key.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _identity(fields: Any) -> DeviceIdentity:
    """Return the identity from the JSON of its file; raise ValueError or TypeError if it is damaged."""
    found = DeviceIdentity(**fields)
    for value, kind in ((found.url, str), (found.name, str), (found.node, int), (found.ca, str)):
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is not of type {kind.__name__}")
    if not found.url.startswith("https://"):
        raise ValueError(f"{found.url} is not an https:// address")
    ssl.PEM_cert_to_DER_cert(found.ca)
    return found
