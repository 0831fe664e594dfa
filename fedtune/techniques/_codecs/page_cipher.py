"""Encrypts pages that this process writes and reads itself, with a key that never leaves its memory."""

import os
from typing import Any

__all__ = ["PageCipher"]


class PageCipher:
    """AES-256 in counter mode. Each page has a number of its own, so no key stream is used twice.

    It hides the content. It does not detect changes.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def apply(self, content: Any, number: int) -> bytes:
        """Encrypt the bytes of page ``number``, or decrypt them."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        nonce = number.to_bytes(8, "big") + bytes(8)  # the counter of blocks is in the lower half
        stream = Cipher(algorithms.AES(self._key), modes.CTR(nonce)).encryptor()
        return stream.update(content) + stream.finalize()
