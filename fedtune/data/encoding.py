"""Decodes bytes to text in the given encoding, or in one detected from the bytes."""

import re

from fedtune.errors import DataError

__all__ = ["decode_text"]

_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32"}
_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
"""Byte order marks, longer ones first."""
_SAMPLE = 1 << 16
_WESTERN = 0.2
"""The largest share of non-ASCII letters in a text that is accepted as Western European."""
_SIGN_IN_WORD = re.compile(rb"[A-Za-z][\xa1-\xac\xae-\xbf][a-z]")
"""In cp1252 these bytes are signs, such as superscripts, which do not occur inside words.

In similar encodings they are letters.
"""


def decode_text(content: bytes, encoding: str | None, name: str) -> tuple[str, str]:
    """Return the text, and the encoding if it was guessed, else an empty string.

    UTF-8, UTF-16 and UTF-32 are detected from the bytes. Otherwise only cp1252 is guessed, for Western European text.
    Raises DataError when ``encoding`` does not fit or none is detected.
    """
    chosen = encoding or _marked(content) or _wide(content) or "utf-8"
    try:
        return content.decode(chosen).removeprefix("\ufeff"), ""
    except UnicodeDecodeError as error:
        if encoding is not None or chosen != "utf-8" or not _is_western(content):
            raise DataError(f"{name} is no text in {chosen}; say which encoding it has in data.encoding") from error
    try:
        return content.decode("cp1252"), "cp1252"
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is no text in utf-8; say which encoding it has in data.encoding") from error


def _marked(content: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), None)


def _wide(content: bytes) -> str | None:
    """Detect UTF-16 without a byte order mark: every other byte of Latin text is zero."""
    sample = content[: _SAMPLE // 2 * 2]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if max(even, odd) < 0.3 * (len(sample) // 2) or not len(sample):
        return None
    return "utf-16-be" if even > odd else "utf-16-le"


def _is_western(content: bytes) -> bool:
    plain = len(re.findall(rb"[A-Za-z]", content))
    high = sum(1 for byte in content if byte >= 0xC0)
    return high <= _WESTERN * (plain + high) and not _SIGN_IN_WORD.search(content)
