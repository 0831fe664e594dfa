"""Makes text from other machines safe to store and to show."""

from fedtune.errors import ServerError

__all__ = ["LONGEST", "clean_lines", "clean_text", "require_clean"]

LONGEST = 200
"""The default limit of characters of an untrusted text."""


def clean_text(value: object, longest: int = LONGEST) -> str:
    """Return ``value`` as one short printable line.

    A character that does not print (control and escape codes, C1 codes such as U+009B, direction marks such as U+202E,
    zero-width characters, line ends, lone surrogates) is replaced by its escape sequence. A terminal then does not act
    on it, and a reader still sees it. A text of more than ``longest`` characters is truncated and ends in an ellipsis.
    """
    text = value if isinstance(value, str) else str(value)
    shown = "".join(_visible(character) for character in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def clean_lines(value: object, longest: int = 20 * LONGEST) -> str:
    """Return ``value`` cleaned by :func:`clean_text` line by line; line ends are kept."""
    text = value if isinstance(value, str) else str(value)
    shown = "\n".join(clean_text(line, longest) for line in text[: longest + 1].splitlines())
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def require_clean(value: object, what: str, longest: int = LONGEST) -> str:
    """Return ``value`` unchanged; :class:`ServerError` when it is no string, too long, or has characters that do not
    print.
    """
    if not isinstance(value, str):
        raise ServerError(f"{what} is no text; send a string of at most {longest} characters")
    if len(value) > longest:
        raise ServerError(f"{what} has {len(value)} characters, and {longest} are allowed")
    if not value.isprintable():
        raise ServerError(f"{what} holds characters that do not print ({clean_text(value, 40)}); leave them out")
    return value


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
