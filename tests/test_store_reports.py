"""What is read out of recorded runs: figures, documents and tables, against values worked out by hand."""

import ast
import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet
import pytest

from fedtune.errors import StoreError
from fedtune.tracking import RoundRecord, RunRecord, Store
from fedtune.tracking.run_json import json_text, make_run_document
from fedtune.tracking.run_summary import (
    compare_before_and_after,
    compute_train_loss,
    diff_recipes,
    find_main_metric_name,
    get_headline_metric,
    get_metric_series,
    list_domains,
    list_metrics,
    sum_costs,
)
from fedtune.tracking.table_export import export_runs
from tests.store_examples import a_client_record, a_metric, a_round, fill

ROOT = Path(__file__).parents[1]
Recorded = list[tuple[RunRecord, list[RoundRecord]]]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Two runs: three rounds of one, one round of the other."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    with Store.open() as store:
        fill(store, "film-1a2b")
        fill(store, "film-3c4d", rounds=1, name="other")
        yield [(run, store.rounds(run.id)) for run in reversed(store.runs())]


def _run_with(recipe: str = "{}") -> RunRecord:
    now = datetime.now(UTC)
    return RunRecord(
        id="film-1",
        name="film",
        status="completed",
        reason="",
        recipe=recipe,
        seed=0,
        engine="in-process",
        created_at=now,
        finished_at=now,
        rounds_planned=1,
        rounds_completed=1,
    )


def test_totals_are_sums_and_peaks() -> None:
    cost = sum_costs(
        [a_round(0), a_round(1, client_records=(a_client_record(0), a_client_record(1, status="rejected")))]
    )
    assert (cost.bytes_down, cost.bytes_up) == (6_000_000_001, 4_000_000_001)
    assert (cost.activation_memory, cost.peak_memory) == (5_000_000_001, 7_000_000_001)
    assert (cost.seconds, cost.merged, cost.requested) == (6.0, 1, 2)
    assert sum_costs([]).activation_memory == 0


def test_the_main_metric_is_accuracy_then_perplexity_then_loss_of_held_out_examples() -> None:
    def of(*metrics: tuple[str, str], recipe: str = "{}") -> str | None:
        scored = [(0, a_metric(1.0, part, "all", name)) for part, name in metrics]
        return find_main_metric_name(_run_with(recipe), scored)

    assert of(("validation", "loss"), ("validation", "accuracy")) == "accuracy"
    assert of(("test", "loss"), ("test", "perplexity")) == "perplexity"
    assert of(("train", "accuracy"), ("validation", "loss")) == "loss"
    assert of(("train", "loss")) is None
    named = '{"version": 2, "evaluation": {"main_metric": "f1"}}'
    assert of(("validation", "accuracy"), ("validation", "f1"), recipe=named) == "f1"
    assert of(("validation", "accuracy"), ("validation", "loss"), recipe=named) == "accuracy"


def test_the_result_is_the_test_part_once_it_was_scored_after_training() -> None:
    untrained = a_round(0, metrics=(a_metric(0.4), a_metric(0.3, "test")))
    half_way = a_round(1, metrics=(a_metric(0.6),))
    last = a_round(2, metrics=(a_metric(0.7), a_metric(0.65, "test")))
    assert get_headline_metric(_run_with(), list_metrics([untrained, half_way])) == ("validation", "accuracy", 0.6)
    assert get_headline_metric(_run_with(), list_metrics([untrained, half_way, last])) == ("test", "accuracy", 0.65)
    assert get_headline_metric(_run_with(), [(0, a_metric(0.3, "test"))]) == ("test", "accuracy", 0.3)
    assert get_headline_metric(_run_with(), []) is None


def test_before_is_round_zero_and_after_is_the_last_round_that_was_scored() -> None:
    rounds = [a_round(0), a_round(1), a_round(2, metrics=())]
    found = compare_before_and_after(rounds, "validation", "accuracy")
    assert found == {"film": (0.6, 0.7), "tweets": (0.5, 0.6), "all": (0.55, 0.65)}
    assert list(found) == list_domains(rounds, "validation", "accuracy") == ["film", "tweets", "all"]
    [(before, after)] = compare_before_and_after(
        [a_round(0, metrics=(a_metric(0.5),))], "validation", "accuracy"
    ).values()
    assert before == 0.5
    assert math.isnan(after)
    [(before, after)] = compare_before_and_after(
        [a_round(3, metrics=(a_metric(0.5),))], "validation", "accuracy"
    ).values()
    assert math.isnan(before)
    assert after == 0.5


def test_a_series_follows_one_metric_of_one_domain() -> None:
    assert get_metric_series([a_round(0), a_round(2)], "validation", "tweets", "accuracy") == {0: 0.5, 2: 0.7}


def test_the_training_loss_weighs_merged_contributions_by_examples() -> None:
    light = a_client_record(0, num_examples=1, train_loss=3.0)
    heavy = a_client_record(1, num_examples=3, train_loss=1.0)
    refused = a_client_record(2, num_examples=1000, train_loss=math.nan, status="rejected")
    assert compute_train_loss([light, heavy, refused]) == 1.5
    assert math.isnan(compute_train_loss([refused]))


def test_differences_are_the_settings_that_are_not_the_same_everywhere() -> None:
    one = {"seed": 1, "train": {"lr": 0.1, "local_steps": 5}, "merge": [{"mean": {}}]}
    two = {"seed": 1, "train": {"lr": 0.2}, "merge": [{"mean": {}}]}
    assert diff_recipes([one, two]) == {"train.lr": [0.1, 0.2], "train.local_steps": [5, None]}
    assert diff_recipes([one]) == {}


def test_a_document_has_the_promised_keys_and_the_newest_checkpoint(recorded: Recorded, tmp_path: Path) -> None:
    found = make_run_document(*recorded[0])
    assert set(found) == {
        *("schema_version", "id", "name", "status", "reason", "recipe", "seed", "engine", "created_at", "finished_at"),
        *("rounds_planned", "rounds_completed", "metrics", "checkpoint", "stream"),
    }
    assert found["stream"] is None
    assert (found["id"], found["status"], found["rounds_completed"]) == ("film-1a2b", "completed", 3)
    assert found["recipe"]["train"]["techniques"] == [{"lora": {"rank": 8}}]
    assert found["checkpoint"] == {
        "round": 3,
        "path": str(tmp_path / "runs" / "a" / "round-3"),
        "sha256": f"{3:064x}",
        "bytes": 10**10 + 3,
        "pruned": False,
        "memory_sha256": None,
        "memory_bytes": None,
    }
    assert found["metrics"][0] == {
        "round": 0,
        "split": "validation",
        "domain": "all",
        "name": "accuracy",
        "value": 0.55,
        "device_type": None,
    }
    assert len(found["metrics"]) == 4 * 3


def test_a_detailed_document_adds_the_rounds_and_their_contributions(recorded: Recorded) -> None:
    rounds = make_run_document(*recorded[0], detailed=True)["rounds"]
    assert [one["number"] for one in rounds] == [0, 1, 2, 3]
    assert rounds[2]["client_records"][1] == asdict(a_client_record(1))
    assert rounds[0]["checkpoint"]["sha256"] == f"{0:064x}"


def test_every_key_of_a_document_is_documented(recorded: Recorded) -> None:
    described = (Path(__file__).parents[1] / "docs" / "runs-schema.md").read_text()
    found = make_run_document(*recorded[0], detailed=True)
    last = found["rounds"][-1]
    for keys in (found, found["metrics"][0], found["checkpoint"], last, last["client_records"][0]):
        assert [key for key in keys if f"`{key}`" not in described] == []


def list_splits() -> set[str]:
    """The values that the package's code gives to ``split`` of a metric, as it is written."""
    found: set[str] = set()
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "MetricRecord(" in text:
            tree = ast.parse(text)
            found |= {value for call in ast.walk(tree) if isinstance(call, ast.Call) for value in splits_of(call, text)}
    return found


def splits_of(call: ast.Call, text: str) -> Iterator[str]:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name in ("_scores", "_score_stream"):
        yield ast.literal_eval(call.args[3])
    for keyword in call.keywords if name == "MetricRecord" else ():
        value = keyword.value
        if keyword.arg == "split" and isinstance(value, ast.Constant):
            yield str(value.value)
        elif keyword.arg == "split" and isinstance(value, ast.Name) and value.id != "called":
            [line] = re.findall(rf'^{value.id}(?:, \w+)* = "([\w-]+)"', text, re.MULTILINE)
            yield line


def test_every_split_that_is_recorded_is_documented() -> None:
    described = (ROOT / "docs" / "runs-schema.md").read_text(encoding="utf-8")
    rows = described.partition("| `split` | meaning |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    listed = {name for row in rows for name in re.findall("`([a-z-]+)`", row.split("|")[1])}
    known = {
        "validation",
        "test",
        "test-before",
        "border",
        "local",
        "drift",
        "end",
        "merge",
        "privacy",
        "updates",
        "simulation",
    }
    assert list_splits() == known
    assert known - listed == set()


def test_json_has_null_where_a_number_is_not_one() -> None:
    assert json.loads(json_text([math.nan, {"a": (math.inf, 1.5)}])) == [None, {"a": [None, 1.5]}]


def test_parquet_tables_hold_every_row_with_its_type(recorded: Recorded, tmp_path: Path) -> None:
    written = export_runs(recorded, "parquet", tmp_path / "out")
    tables = {path.stem: pyarrow.parquet.read_table(path) for path in written}
    assert {name: table.num_rows for name, table in tables.items()} == {
        "runs": 2,
        "rounds": 6,
        "client_records": 3 * 3 + 3,
        "metrics": 6 * 3,
        "client_scores": 0,
        "checkpoints": 6,
        "samples": 0,
        "task_scores": 0,
        "tasks": 0,
    }
    assert tables["client_records"].to_pylist()[4] == {"run_id": "film-1a2b", "round": 2} | asdict(a_client_record(1))
    assert str(tables["client_records"].schema.field("activation_memory").type) == "int64"
    assert tables["runs"].to_pylist()[1] == asdict(recorded[1][0])


def test_csv_tables_hold_every_row(recorded: Recorded, tmp_path: Path) -> None:
    export_runs(recorded, "csv", tmp_path / "out")
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert rows[0] == {
        "run_id": "film-1a2b",
        "round": "0",
        "split": "validation",
        "domain": "all",
        "name": "accuracy",
        "value": "0.55",
        "device_type": "",
    }


def test_a_run_without_rounds_still_exports_all_tables(recorded: Recorded, tmp_path: Path) -> None:
    written = export_runs([(recorded[0][0], [])], "parquet", tmp_path / "out")
    assert [path.stem for path in written] == [
        "checkpoints",
        "client_records",
        "client_scores",
        "metrics",
        "rounds",
        "runs",
        "samples",
        "task_scores",
        "tasks",
    ]
    assert "train_loss" in pyarrow.parquet.read_table(tmp_path / "out" / "client_records.parquet").column_names


def test_json_export_is_the_detailed_documents(recorded: Recorded, tmp_path: Path) -> None:
    export_runs(recorded, "json", tmp_path / "runs.json")
    found = json.loads((tmp_path / "runs.json").read_text())
    assert found == [json.loads(json_text(make_run_document(run, rounds, detailed=True))) for run, rounds in recorded]


def test_an_export_never_writes_over_or_into_what_is_there(recorded: Recorded, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreError, match="is there already; choose a new folder"):
        export_runs(recorded, "csv", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*/file/out"):
        export_runs(recorded, "csv", tmp_path / "file" / "out")


def test_an_export_that_breaks_off_leaves_nothing(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())

    def break_off(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.tracking.table_export.os.rename", break_off)
    with pytest.raises(StoreError, match="No space left on device"):
        export_runs(recorded, "csv", tmp_path / "out")
    assert set(tmp_path.iterdir()) == before
