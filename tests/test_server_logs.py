"""Logs that stay: their size is bounded, they survive a start, and nothing in them acts on a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.logs import Log, Logs, copy_output_to_log, record_output


def files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_log_is_bounded_its_newest_lines_stay_and_a_new_start_cuts_nothing_off(tmp_path: Path) -> None:
    for start in range(3):
        with Log(tmp_path / "log", most=2000, older=2) as log:
            for number in range(200):
                log.write(f"start {start} line {number}")
    assert files(tmp_path) <= 3 * 2000
    assert len(list(tmp_path.iterdir())) == 3
    newest = Log(tmp_path / "log", most=2000, older=2).tail(30)
    assert [line.partition(" ")[2] for line in newest] == [f"start 2 line {number}" for number in range(170, 200)]


def test_a_line_has_its_moment_no_colour_and_nothing_that_acts_on_a_terminal(tmp_path: Path) -> None:
    with Log(tmp_path / "log") as log:
        log.write("\x1b[92mINFO \x1b[0m: ready 100 %s\n\n\x1b]0;title\x07 \u202eevil\r\n" + "x" * 5000)
    first, second, third = (line.partition(" ") for line in log.tail(10))
    assert first[0].endswith("Z")
    assert len(first[0]) == len("2026-01-01T00:00:00Z")
    assert first[2] == "INFO : ready 100 %s"
    assert second[2] == "\\x1b]0;title\\x07 \\u202eevil"
    assert len(third[2]) == 2000


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (Path("/dev/full"), tmp_path / "folder", tmp_path / "none" / "log"):
        with Log(path) as log:
            log.write("lost")
            log.write("lost too")


def test_what_children_print_is_kept_also_of_those_that_a_child_starts(tmp_path: Path) -> None:
    script = "import subprocess, sys; print('one', flush=True); subprocess.run(['echo', 'two']); print('three', end='')"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with Log(tmp_path / "log") as log:
        thread = copy_output_to_log(process, log)
        process.wait()
        thread.join(10)
    assert [line.partition(" ")[2] for line in log.tail(5)] == ["one", "two", "three"]


def test_the_server_s_lines_and_flower_s_come_in_the_order_of_their_moments(tmp_path: Path) -> None:
    (tmp_path / "flower").mkdir()
    (tmp_path / "server.log").write_text("2026-01-01T00:00:01Z up\n2026-01-01T00:00:03Z trouble\n")
    (tmp_path / "flower" / "superlink.log").write_text("2026-01-01T00:00:02Z WARN\n")
    assert Logs(tmp_path).server(10) == [
        "2026-01-01T00:00:01Z server: up",
        "2026-01-01T00:00:02Z flower: WARN",
        "2026-01-01T00:00:03Z server: trouble",
    ]
    assert Logs(tmp_path).server(1) == ["2026-01-01T00:00:03Z server: trouble"]
    assert Logs(tmp_path / "nowhere").server(10) == []


def test_what_a_run_s_process_prints_and_raises_is_in_the_run_s_log(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="it broke"), record_output("film-1"):  # noqa: PT012
        print("round 1", end="")
        print("  2/2 devices")
        print("careful", file=sys.stderr)
        raise ValueError("it broke")
    lines = [line.partition(" ")[2] for line in Logs(home).run("film-1", 50)]
    assert lines[:3] == ["round 1  2/2 devices", "careful", "Traceback (most recent call last):"]
    assert lines[-1] == "ValueError: it broke"
    assert capsys.readouterr() == ("round 1  2/2 devices\n", "careful\n")
    assert Logs(home).run("film-2", 50) == []
