"""zstd: a standard entropy coder over the whole message.

What: Zstandard on the finished message, after all other codecs. Nothing is lost. The server knows the exact size of the
message, reads no more than this, and refuses a message that expands to another one.
Sends: what the other codecs leave to save: names and shapes, zeros, scales, codes of int8 (about a tenth) and of int4.
Defaults: level 10.
Use when: always last; alone, it saves a few per cent of single-precision values.
Avoid when: it costs more time than bytes are worth: lower the level.
Trap: releases of the library may differ by a few bytes in what they write; all of them read it.
Source: RFC 8878. Python's compression.zstd (3.14) or its backport, whose decompressor takes a largest size; that of
zstandard 0.25 allocates what the header of a frame claims.
"""

import sys
from typing import ClassVar

from pydantic import Field

from fedtune.errors import ClientUpdateError
from fedtune.wire.codecs._codec import EntropyCoder

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["Zstd"]

_LEAST_WINDOW, _LARGEST_WINDOW = 10, 31
"""Limits of the library, as logarithms."""


class Zstd(EntropyCoder):
    """Codes the message by Zstandard."""

    name: ClassVar[str] = "zstd"
    level: int = Field(10, ge=1, le=19, description="higher: smaller and slower")

    def compress(self, content: bytes) -> bytes:
        """Return one frame."""
        return zstd.compress(content, self.level)

    def decompress(self, content: bytes, size: int) -> bytes:
        """Return exactly ``size`` bytes. Memory stays within twice the size, whatever the content claims."""
        window = min(_LARGEST_WINDOW, max(_LEAST_WINDOW, (size - 1).bit_length()))
        reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
        try:
            found = reader.decompress(content, max_length=size)
            rest = b"" if reader.eof else reader.decompress(b"", max_length=1)
        except (zstd.ZstdError, EOFError) as error:
            raise ClientUpdateError(f"the message cannot be decompressed ({error}); update the client") from error
        if rest or len(found) != size or not reader.eof or reader.unused_data:
            raise ClientUpdateError(
                f"the message does not expand to {size} bytes, as this round expects; update the client"
            )
        return found

    def get_most_bytes(self, size: int) -> int:
        """The bound of the format, for data that cannot be compressed."""
        return size + (size >> 8) + 128
