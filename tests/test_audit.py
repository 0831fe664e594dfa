"""The audit's bounds: what one source and all may fill, what repeats, and what is never pushed out."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.server.gateway.refusal import AuditLog, source_of
from fedtune.tracking import AuditRecord, Store, audit


class Watched:
    """An audit whose clock is set by hand."""

    def __init__(self, store: Store) -> None:
        self.now = 6000.0
        self.log = store.access.audit
        self.audit = AuditLog(store.access, lambda: self.now)

    def lines(self) -> list[AuditRecord]:
        return self.log.list_lines(100_000)

    def of(self, who: str) -> list[AuditRecord]:
        return [line for line in self.lines() if line.actor == who]


@pytest.fixture
def watched(home: Path) -> Iterator[Watched]:
    with Store.open() as store:
        yield Watched(store)


def test_one_address_fills_sixty_lines_a_minute_and_the_rest_is_counted(watched: Watched) -> None:
    for number in range(75):
        watched.audit.record_refusal("10.0.0.1", f"knocked {number}")
    watched.audit.record_refusal("10.0.0.2", "knocked too")
    assert len(watched.of("10.0.0.1")) == 60
    assert len(watched.of("10.0.0.2")) == 1
    watched.now += 59.5
    watched.audit.record_refusal("10.0.0.2", "knocked within the minute")
    assert len(watched.of("10.0.0.1")) == 60
    watched.now += 0.5
    watched.audit.record_refusal("10.0.0.2", "knocked later")
    assert watched.of("10.0.0.1")[0].message == "15 more requests within a minute"
    watched.audit.record_refusal("10.0.0.1", "knocked again")
    assert len(watched.of("10.0.0.1")) == 62


def test_what_was_left_out_is_told_also_when_nobody_knocks_any_more(watched: Watched) -> None:
    for number in range(61):
        watched.audit.record_refusal("10.0.0.1", f"knocked {number}")
    watched.now += 61
    watched.audit.flush()
    assert watched.lines()[0].message == "1 more requests within a minute"


def test_a_network_of_ipv6_counts_as_one_address(watched: Watched) -> None:
    for number in range(75):
        watched.audit.record_refusal(f"2001:db8::{number:x}", f"knocked {number}")
    assert len(watched.lines()) == 60
    assert source_of("2001:db8::5%eth0") == source_of("2001:db8:0:0:9::") == "2001:db8::/64"
    assert source_of("::ffff:10.0.0.1") == source_of("10.0.0.1") == "10.0.0.1"
    assert source_of("unknown") == "unknown"


def test_a_key_that_is_shown_does_not_hide_where_a_refusal_comes_from(watched: Watched) -> None:
    for number in range(75):
        watched.audit.record_refusal("10.0.0.1", "knocked", f"device-{number}")
    assert len(watched.lines()) == 60
    assert watched.lines()[0].actor == "device-59 at 10.0.0.1"


def test_all_addresses_together_fill_six_hundred_lines_a_minute(watched: Watched) -> None:
    for number in range(700):
        watched.audit.record_refusal(f"10.0.{number // 250}.{number % 250}", "knocked")
    assert len(watched.lines()) == 600
    watched.now += 60
    watched.audit.flush()
    added = watched.lines()[:-600]
    assert len(added) == 11
    assert added[0].message == "90 more requests from 90 others within a minute"


def test_what_comes_again_within_an_hour_is_one_line(watched: Watched) -> None:
    for _ in range(1000):
        watched.audit.record_refusal("10.0.0.1", "knocked")
        watched.now += 1
    watched.audit.flush()
    [line] = watched.lines()
    assert line.times == 1000
    assert line.last_recorded_at >= line.recorded_at
    watched.now += 3600
    watched.audit.record_refusal("10.0.0.1", "knocked")
    assert len(watched.lines()) == 2


def test_refusals_never_push_out_what_was_done_nor_others_of_their_kind(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_DONE": 100, "_REFUSED": 200, "_REFUSED_PER_SOURCE": 50, "_PRUNE_EVERY": 1}.items():
        monkeypatch.setattr(audit, name, value)
    watched.audit.record_action("ada", "run r submitted")
    watched.log.write_line("refused", "10.9.9.9", "an unknown key", "10.9.9.9")
    for number in range(400):
        watched.log.write_line("refused", "10.0.0.1", f"knocked {number}", "10.0.0.1")
    assert len(watched.of("10.0.0.1")) == 50
    for number in range(600):
        source = f"10.0.1.{number % 6}"
        watched.log.write_line("refused", source, f"knocked {number}", source)
    assert len(watched.lines()) <= 202
    assert [line.message for line in watched.of("ada")] == ["run r submitted"]
    assert len(watched.of("10.9.9.9")) == 1
    for number in range(150):
        watched.audit.record_action("ada", f"run {number} submitted")
    assert len(watched.of("ada")) == 100


def test_lines_are_cleaned_and_cut_before_they_are_kept(watched: Watched) -> None:
    watched.audit.record_refusal("10.0.0.1", "\x1b]0;title\x07\x9b31m\u202e[/x]\n" + "x" * 20_000_000)
    [line] = watched.lines()
    assert line.message.startswith("\\x1b]0;title\\x07\\x9b31m\\u202e[/x]\\n")
    assert len(line.message) == 500


def test_lines_are_found_by_the_moment_they_were_last_true(watched: Watched) -> None:
    number = watched.log.write_line("refused", "10.0.0.1", "knocked")
    watched.log.write_line("done", "ada", "run r submitted")
    later = datetime.now(UTC)
    watched.log.count_repeats(number, 3)
    assert [(line.message, line.times) for line in watched.log.list_lines(since=later)] == [("knocked", 4)]
    assert watched.log.list_lines(since=later + timedelta(minutes=1)) == []
    assert [line.message for line in watched.log.list_lines(1)] == ["run r submitted"]
    assert [line.message for line in watched.log.list_lines(before=number + 1)] == ["knocked"]
