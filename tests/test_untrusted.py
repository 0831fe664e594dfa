"""Text from strangers: nothing in it may act on a terminal, and nothing in it may be long."""

import pytest

from fedtune.errors import ServerError
from fedtune.untrusted import clean_text, require_clean

ACTING = [
    "\x1b[2J",
    "\x9b2J",
    "\u202eexe.txt",
    "\x1b]0;title\x07",
    "a\nb",
    "\u200b",
    "\ud800",
    "\x00",
    "\u2028",
    "\x7f",
]


@pytest.mark.parametrize("text", ACTING)
def test_nothing_that_acts_on_a_terminal_is_left(text: str) -> None:
    assert clean_text(text).isprintable()


@pytest.mark.parametrize("text", ["plain", "[red]brackets[/nope]", "Ünïcödé 測試", ""])
def test_what_prints_stays_as_it_is(text: str) -> None:
    assert clean_text(text) == text == require_clean(text, "a name")


def test_a_long_text_is_cut_and_says_so() -> None:
    assert clean_text("x" * 20_000_000, 10) == "x" * 9 + "…"
    assert len(clean_text("\x1b" * 1000, 50)) == 50


def test_what_is_no_text_is_shown_as_python_writes_it() -> None:
    assert clean_text(None) == "None"


@pytest.mark.parametrize("value", [*ACTING, "x" * 201, 7, None])
def test_a_name_that_is_not_clean_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(ServerError) as refused:
        require_clean(value, "the device's name")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300
