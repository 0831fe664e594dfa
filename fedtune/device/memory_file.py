"""The bytes of a file of a device's memory: safetensors, which say what they are of, encrypted where there is a key.

AES-256-GCM authenticates the format, the run and the visit too, so that a file cannot take the place of another one.
Each file has a random nonce. A file without encryption carries a digest, which finds damage but no forgery, and names
its owner, so that the file of another device is noticed.
"""

import hashlib
import json
import os
from collections.abc import Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedtune.checkpoint import hash_tensors
from fedtune.errors import StoreError

__all__ = ["MOST_ENCRYPTED_BYTES", "decode_memory", "encode_memory", "make_mark"]

_FORMAT = 2
_ENCRYPTED = b"fedtune memory, AES-256-GCM\n"
_NONCE = 12
MOST_ENCRYPTED_BYTES = 1 << 30
"""The largest file that can be encrypted; one call of AES-GCM takes less than 2 GiB."""
_BROKEN = (SafetensorError, ValueError, KeyError, TypeError)


def make_mark(run_id: str, visit: int, owner: bytes = b"") -> str:
    """Return what a file is of: the format, the run and the owner as a hash, and the visit."""
    return f"{_FORMAT}/{hashlib.sha256(run_id.encode() + owner).hexdigest()}/{visit}"


def encode_memory(tensors: Mapping[str, Tensor], mark: str, key: bytes | None) -> bytes:
    """Return the content of a file; without a key it is not encrypted."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    plain = safetensors.torch.save(whole, {"fedtune": f"{mark} {hash_tensors(whole)}"})
    if key is None:
        return plain
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # only trainers with an encrypted memory need it

    nonce = os.urandom(_NONCE)
    return _ENCRYPTED + nonce + AESGCM(key).encrypt(nonce, plain, mark.encode())


def decode_memory(content: bytes, mark: str, key: bytes | None) -> dict[str, Tensor]:
    """Return the tensors of a file. Raise StoreError, which says what is wrong, unless ``mark`` and key are its own."""
    plain = content if key is None else _decrypt(content, mark, key)
    if plain.startswith(_ENCRYPTED):
        raise StoreError("is encrypted, but the recipe does not ask for that")
    try:
        found, _, digest = _read_mark(plain).rpartition(" ")
        tensors = safetensors.torch.load(plain)
    except _BROKEN as error:
        raise StoreError("is damaged") from error
    if found != mark:
        raise StoreError("is from another run, task, device or version of fedtune")
    if hash_tensors(tensors) != digest:
        raise StoreError("has changed since it was written")
    return tensors


def _decrypt(content: bytes, mark: str, key: bytes) -> bytes:
    if not content.startswith(_ENCRYPTED):
        raise StoreError("is not encrypted, but the recipe asks for that")
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = content[len(_ENCRYPTED) :]
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], mark.encode())
    except (InvalidTag, ValueError) as error:
        raise StoreError("was changed, or is from another run or task, or has another key") from error


def _read_mark(plain: bytes) -> str:
    size = int.from_bytes(plain[:8], "little")
    return str(json.loads(plain[8 : 8 + size])["__metadata__"]["fedtune"])
