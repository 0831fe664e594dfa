"""The page of runs: what the table holds, and in which order, for each address."""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fedtune.tracking.run_summary import sum_costs
from fedtune.web.number_text import format_change, format_duration, format_megabytes, format_number, format_score
from fedtune.web.page_error import PageError
from fedtune.web.runs_page import PAGE_SIZE
from fedtune.web.runs_query import RunsQuery
from fedtune.web.sparkline import draw_sparkline
from tests.page_examples import copy_runs, open_page
from tests.store_examples import a_metric, a_round, fill, start

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def list_rows(text: str) -> list[str]:
    """The ids in the table, in order."""
    return re.findall(r'name="runs" value="([^"]*)"', text)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_page(tmp_path_factory.mktemp("page") / "store.sqlite") as (store, client):
        for number, (name, value) in enumerate([("b", 0.7), ("a", 0.9), ("c", 0.8)]):
            start(store, f"{name}-run", name=name, seed=number, rounds_planned=4)
            store.commit_round(f"{name}-run", a_round(0))
            scored = (a_metric(value), a_metric(0.1, domain="film"), a_metric(value / 2, split="test"))
            store.commit_round(f"{name}-run", a_round(1, metrics=scored))
        store.finish("a-run", "completed")
        store.finish("c-run", "failed", f"out of memory {ATTACK}")
        start(store, "queued-run", status="queued", recipe='{"train": {"lr": 0.5}}')
        yield client


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", "queued c a b"),
        ("?sort=started", "b a c queued"),
        ("?sort=run", "a b c queued"),
        ("?sort=-run", "queued c b a"),
        ("?sort=-result", "a c b queued"),
        ("?sort=result", "b c a queued"),
        ("?sort=status", "a c b queued"),
        ("?sort=seed", "b a c queued"),
        ("?status=completed", "a"),
        ("?status=completed,failed", "c a"),
        ("?q=MEMORY", "c"),
        ("?q=train.lr:0.5", "queued"),
        ("?q=rank:8+run", "c a b"),
        ("?q=nothing", ""),
    ],
)
def test_the_table_is_filtered_and_sorted_by_its_address(page: TestClient, address: str, expected: str) -> None:
    text = page.get(f"/runs{address}").text
    found = " ".join(one.removesuffix("-run") for one in list_rows(text))
    assert found == expected
    assert ("No run matches." in text) == (not expected)


def test_a_row_has_the_figures_of_its_run(page: TestClient) -> None:
    row = re.search(r'value="a-run".*?</tr>', page.get("/runs").text, re.DOTALL)
    assert row is not None
    cells = [re.sub(r"<[^>]*>|\s+", " ", cell).strip() for cell in re.findall(r"<td.*?</td>", row[0], re.DOTALL)]
    costs = sum_costs([a_round(1)])
    assert ".450" in cells
    assert format_megabytes(costs.bytes_up) in cells
    assert format_megabytes(costs.peak_memory) in cells
    assert format_duration(2.5 + 3.5) in cells


def test_the_database_sums_up_what_the_rounds_hold(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        rounds = fill(store)
        missing = replace(a_round(4).client_records[0], client=9, status="missing")
        store.commit_round("film-1a2b", record := a_round(4, client_records=(missing,), seconds=math.nan))
        costs, expected = store.costs.sum_up(["film-1a2b", "none"]), sum_costs([*rounds, replace(record, seconds=0)])
        for name in ("bytes_up", "bytes_down", "peak_memory", "merged", "requested", "seconds"):
            assert getattr(costs["film-1a2b"], name) == getattr(expected, name)
        assert costs["film-1a2b"].clients == 4
        assert costs["none"].requested == 0


def test_stored_text_is_escaped(page: TestClient) -> None:
    for address in (
        "/runs",
        f"/runs?q={ATTACK}",
        f"/{ATTACK}",
        f"/runs?sort={ATTACK}",
        f"/runs?theme={ATTACK}&page={ATTACK}",
    ):
        text = page.get(address).text
        assert "<script" not in text
        assert "<img" not in text


@pytest.mark.parametrize("address", ["sort=size", "page=0", "page=x", "page=-1", "page=²", "status=done"])
def test_what_is_not_understood_is_refused(page: TestClient, address: str) -> None:
    answer = page.get(f"/runs?{address}")
    assert answer.status_code == 400
    assert "write" in answer.text


def test_a_query_returns_from_its_address() -> None:
    query = RunsQuery(q="a b&c", status=("failed",), sort="run", page=3)
    address = TestClient(lambda *_: None, base_url="http://h").build_request("GET", f"http://h{query.url}").url  # type: ignore[arg-type]
    assert RunsQuery.parse(dict(address.params)) == query
    assert query.toggle_status("failed").status == ()
    assert [query.sort_by("run").sort, query.sort_by("started").sort] == ["-run", "-started"]
    with pytest.raises(PageError):
        RunsQuery.parse({"page": "9" * 5000})


def test_an_empty_store_says_how_to_start(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (_, client):
        text = client.get("/runs").text
    assert "No runs yet" in text
    assert "fedtune simulate recipes/sentiment.yaml" in text


def test_a_sparkline_keeps_its_shape() -> None:
    assert draw_sparkline({0: 0.0, 1: 1.0, 2: 0.5}) == "3.0,19.0 48.0,3.0 93.0,11.0"
    assert draw_sparkline({0: 0.5, 4: 0.5}) == "3.0,19.0 93.0,19.0"
    assert draw_sparkline({0: 1.0, 1: math.nan, 2: math.inf}) == ""
    many = draw_sparkline({number: number for number in range(1000)}).split()
    assert len(many) < 110
    assert (many[0], many[-1]) == ("3.0,19.0", "93.0,3.0")


def test_numbers_have_their_form() -> None:
    assert [format_score(value, "accuracy") for value in (0.84649, 1.0, -0.5, 0.0, math.nan, None, 12345.6)] == [
        ".846",
        "1.000",
        "\N{MINUS SIGN}.500",
        ".000",
        "",
        "",
        "1.235e+04",
    ]
    assert [format_number(0.5), format_change(0.5), format_change(-0.5)] == ["0.500", "+.500", "\N{MINUS SIGN}.500"]
    assert [format_duration(value) for value in (4.25, 59.96, 1152, 21720, math.inf)] == [
        "4.2 s",
        "1 min",
        "19 min",
        "6 h 02 min",
        "",
    ]


def test_a_thousand_runs_open_within_a_second(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with open_page(path) as (store, client):
        records = tuple(replace(a_round(1).client_records[0], client=client) for client in range(8))
        start(store, "film-1a2b", rounds_planned=20)
        for number in range(21):
            store.commit_round("film-1a2b", a_round(number, client_records=records if number else ()))
        store.finish("film-1a2b", "completed")
    copy_runs(path, 1000)
    with open_page(path) as (store, client):
        begun = time.process_time()
        text = client.get("/runs").text
        assert time.process_time() - begun < 1
        assert len(list_rows(text)) == PAGE_SIZE
        assert "1,000 of 1,000" in text
        begun = time.process_time()
        assert len(list_rows(client.get("/runs?sort=-result&page=40").text)) == PAGE_SIZE
        assert time.process_time() - begun < 2
