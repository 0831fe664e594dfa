"""The commands of ``fedtune runs``: what they print, what they write, what they refuse."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedtune.cli.follow_run import follow_run
from fedtune.cli.runs import runs
from fedtune.errors import StoreError
from fedtune.tracking import Store, claim_run, rows
from tests.store_examples import a_client_record, a_round, fill, start

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def filled() -> None:
    with Store.open() as store:
        fill(store, "film-1a2b")
        time.sleep(0.002)
        fill(store, "tweets-3c4d", rounds=1, recipe='{"train": {"techniques": [{"bias": {}}], "lr": 0.001}}')


def call(*arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(runs, arguments, input=answer)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def parsed(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def test_an_empty_store_says_how_to_start() -> None:
    assert "Start one: fedtune simulate" in printed("list")
    assert parsed("list") == []


@pytest.mark.usefixtures("filled")
def test_list_shows_every_run_newest_first() -> None:
    lines = printed("list").splitlines()
    assert [line.split()[:5] for line in lines[2:]] == [
        ["tweets-3c4d", "completed", "1/3", "accuracy", "0.6500"],
        ["film-1a2b", "completed", "3/3", "accuracy", "0.8500"],
    ]
    assert [run["id"] for run in parsed("list")] == ["tweets-3c4d", "film-1a2b"]
    assert "rounds" not in parsed("list")[0]


@pytest.mark.usefixtures("filled")
def test_show_tells_rounds_domains_and_devices() -> None:
    lines = [line.split() for line in printed("show", "film").splitlines()]
    assert ["2", "completed", "0.7500", "1.5066", "3/3", "15.0", "GB", "4.5", "s"] in lines
    assert ["tweets", "validation", "0.5000", "0.8000"] in lines
    peak = ["peak", "5.0", "GB", "activation", "memory,", "7.0", "GB", "process"]
    assert peak in lines
    assert ["tablet", "1", "3/3", "306", "6.0", "GB", "5.0", "GB", "7.0", "GB"] in lines
    assert [round_["number"] for round_ in parsed("show", "film")["rounds"]] == [0, 1, 2, 3]


def test_show_names_failed_rounds_and_contributions_that_were_not_merged() -> None:
    with Store.open() as store:
        start(store)
        bad = a_client_record(1, status="rejected", reason="norm [bold]9[/bold] above 5")
        store.commit_round("film-1a2b", a_round(1, status="failed", reason="no quorum", client_records=(bad,)))
    lines = printed("show", "latest").splitlines()
    assert "round 1 failed: no quorum" in lines
    assert "round 1, client 1 (phone): rejected, norm [bold]9[/bold] above 5" in lines


@pytest.mark.usefixtures("filled")
def test_compare_puts_runs_side_by_side_and_names_the_settings_that_differ() -> None:
    lines = [line.split() for line in printed("compare", "film", "tweets").splitlines()]
    assert lines[0] == ["film-1a2b", "tweets-3c4d"]
    assert ["result", "accuracy", "0.8500", "accuracy", "0.6500"] in lines
    assert ["sent", "back", "18.0", "GB", "6.0", "GB"] in lines
    assert ["train.techniques", "lora", "rank", "8", "bias"] in lines
    assert not [line for line in lines if "train.lr" in line]
    found = parsed("compare", "film", "tweets")
    assert [run["id"] for run in found["runs"]] == ["film-1a2b", "tweets-3c4d"]
    assert found["differences"]["train.techniques"] == [[{"lora": {"rank": 8}}], [{"bias": {}}]]


@pytest.mark.usefixtures("filled")
def test_plot_draws_into_the_run_or_where_it_is_told(home: Path, tmp_path: Path) -> None:
    assert parsed("plot", "film") == {"path": str(home / "runs" / "film-1a2b" / "plot.png")}
    assert (home / "runs" / "film-1a2b" / "plot.png").stat().st_size > 10_000
    printed("plot", "film", "tweets")
    assert (tmp_path / "runs.png").exists()
    assert printed("plot", "film", "-o", "a.svg") == "drawn: a.svg\n"
    assert (tmp_path / "a.svg").exists()


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("format_", ["csv", "parquet"])
def test_export_writes_a_folder_of_tables(tmp_path: Path, format_: str) -> None:
    paths = parsed("export", "film", "tweets", "--format", format_, "-o", "out")["paths"]
    names = (
        "checkpoints",
        "client_records",
        "client_scores",
        "metrics",
        "rounds",
        "runs",
        "samples",
        "task_scores",
        "tasks",
    )
    assert paths == [str(tmp_path / "out" / f"{name}.{format_}") for name in names]


@pytest.mark.usefixtures("filled")
def test_export_writes_one_json_file(tmp_path: Path) -> None:
    assert printed("export", "film", "--format", "json", "-o", "film.json") == "written: film.json\n"
    assert json.loads((tmp_path / "film.json").read_text()) == [parsed("show", "film")]


@pytest.mark.usefixtures("filled")
def test_delete_asks_then_removes_rows_and_files(home: Path) -> None:
    checkpoint = home / "runs" / "film-1a2b" / "round-3" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert call("delete", "film", answer="n\n").exit_code == 1
    assert checkpoint.exists()
    assert call("delete", "film", answer="y\n").stdout == "removed: film-1a2b\n"
    assert not checkpoint.parents[1].exists()
    assert [run["id"] for run in parsed("list")] == ["tweets-3c4d"]
    assert parsed("delete", "tweets", "--yes") == {"deleted": "tweets-3c4d"}
    assert parsed("list") == []


@pytest.mark.usefixtures("filled")
def test_a_run_that_is_being_executed_is_not_deleted() -> None:
    with claim_run("film-1a2b"), pytest.raises(StoreError, match="is being executed by another process"):
        call("delete", "film", "--yes")
    assert len(parsed("list")) == 2


@pytest.mark.usefixtures("filled")
def test_another_store_is_named_by_its_url(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/other.sqlite") as store:
        fill(store, "elsewhere")
    assert [run["id"] for run in parsed("list", "--store", f"sqlite:///{tmp_path}/other.sqlite")] == ["elsewhere"]


@pytest.mark.parametrize("command", sorted(runs.commands))
def test_every_command_explains_itself_and_speaks_json(command: str) -> None:
    text = call(command, "--help").stdout
    assert f"Example: fedtune runs {command}" in text
    assert "--json" in text
    assert ("--operator-file FILE" if command in ("resume", "stop", "watch") else "--store URL") in text


LIST = """
import sys
from fedtune.cli.follow_run import follow_run
from fedtune.cli.runs import runs
runs(["list"], standalone_mode=False)
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.usefixtures("filled")
def test_list_starts_without_anything_heavy_and_survives_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "dumb", "PYTHONIOENCODING": "ascii"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"alembic", "torch", "transformers", "datasets", "matplotlib", "pyarrow"} & set(done.stderr.split())
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert "tweets-3c4d" in done.stdout


def many_rounds(count: int, **changes: Any) -> None:
    with Store.open() as store:
        start(store, "long-1a2b", rounds_planned=count)
        for number in range(count + 1):
            store.commit_round("long-1a2b", a_round(number, **(changes if number else {})))


def test_a_run_of_many_rounds_shows_a_page_and_more_when_asked() -> None:
    many_rounds(60)
    page = printed("show", "long")
    assert len(page.splitlines()) < 60
    numbers = [int(line.split()[0]) for line in page.splitlines() if line.split()[:1] and line.split()[0].isdecimal()]
    assert numbers == [0, *range(31, 61)]
    assert "30 more: --all" in page
    shorter = printed("show", "long", "--last", "2").splitlines()
    assert [line.split()[0] for line in shorter if "completed" in line] == ["0", "59", "60"]
    whole = printed("show", "long", "--all")
    assert "more: --all" not in whole
    assert [line.split()[0] for line in whole.splitlines() if "completed" in line] == [str(n) for n in range(61)]
    sums = [line for line in page.splitlines() if line.startswith(("sent ", "phone "))]
    assert sums == [line for line in whole.splitlines() if line.startswith(("sent ", "phone "))]
    assert len(parsed("show", "long")["rounds"]) == 61


def test_a_page_holds_the_newest_mishaps_only() -> None:
    many_rounds(40, client_records=(a_client_record(0, status="missing", reason="no reply"),))
    lines = printed("show", "long", "--last", "5").splitlines()
    told = [line for line in lines if line.startswith("round ") and "missing" in line]
    assert [line.split(",")[0] for line in told] == [f"round {number}" for number in range(36, 41)]
    assert "35 earlier lines like these: --all" in lines
    assert len([line for line in printed("show", "long", "--all").splitlines() if "missing" in line]) == 40


def test_rounds_after_a_number_are_all_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    many_rounds(5)
    read: list[Any] = []
    made = rows.make_record

    def counted(record: type[Any], row: Any) -> Any:
        read.append(row)
        return made(record, row)

    monkeypatch.setattr(rows, "make_record", counted)
    with Store.open() as store:
        every, newest = store.rounds("long-1a2b"), store.rounds("long-1a2b", 4)
        read.clear()
        assert store.rounds("long-1a2b", after=4) == newest == every[5:]
        assert {row["round"] for row in read} == {5}
        read.clear()
        assert store.rounds("long-1a2b", after=5) == []
        assert not read


class Answers:
    """An operator's connection to a server whose run ends with its third answer; ``asked`` are the paths."""

    def __init__(self, run: str) -> None:
        self.run, self.asked = run, list[str]()

    def request_json(self, method: str, path: str) -> dict[str, Any]:
        assert method == "GET"
        self.asked.append(path)
        number = len(self.asked) - 1
        records: list[dict[str, Any]] = [
            {"number": one, "status": "completed", "client_records": [], "seconds": 1.0} for one in (0, 1, 2)
        ]
        return {
            "id": self.run,
            "status": "completed" if number == 3 else "running",
            "reason": "",
            "rounds_planned": 2,
            "recipe": {},
            "metrics": [],
            "rounds": [[records[0]], [], records[1:], []][number],
        }


def test_whoever_watches_asks_for_the_rounds_after_the_last_one_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedtune.cli.follow_run._POLL_SECONDS", 0.0)
    answers: Any = Answers("film-1a2b")
    follow_run(answers, "latest")
    queries = [path.partition("?")[2] for path in answers.asked]
    assert queries == ["after=-1", "after=0", "after=0", "after=2"]
    assert answers.asked[1].startswith("runs/film-1a2b?"), "another may be the latest by then"
    shown = capsys.readouterr().out
    assert [line.split()[1] for line in shown.splitlines()] == ["0/2", "1/2", "2/2", "film-1a2b"]
