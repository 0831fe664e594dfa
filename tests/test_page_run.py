"""The page of a run: what it shows is what the store holds, whatever the store holds."""

import json
import math
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.cli.main import cli
from fedtune.recipe.schema import Recipe
from fedtune.tracking import CheckpointRecord, ClientScore, RoundRecord, SampleRecord, Store, TaskRecord
from fedtune.tracking.run_summary import compute_train_loss, sum_costs
from fedtune.web.outcome_words import LETTERS, find_outcome
from fedtune.web.recipe_view import list_changed_settings, make_command
from fedtune.web.run_query import RunQuery
from tests.page_examples import open_page
from tests.store_examples import a_client_record, a_metric, a_round, fill, start

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
STATUSES = ("merged", "rejected", "declined", "error", "missing", "unused")
RECIPE = Recipe.model_validate(yaml.safe_load(Path("recipes/sentiment.yaml").read_text())).model_dump_json()


def a_mixed_round(number: int, clients: int = 7) -> RoundRecord:
    """Every status, a late client, a client without a loss, and a client that was not selected in each third round."""
    records = [
        a_client_record(client, status=STATUSES[(client + number) % 6], staleness=client % 2 or None)
        for client in range(clients)
        if (client + number) % 3
    ]
    records[0] = replace(records[0], train_loss=math.nan)
    return a_round(number, client_records=tuple(records))


def fill_mixed(store: Store, run_id: str = "mixed-1", rounds: int = 4, clients: int = 7) -> list[RoundRecord]:
    start(store, run_id, rounds_planned=rounds, recipe=RECIPE)
    recorded = [a_round(0), *(a_mixed_round(number, clients) for number in range(1, rounds + 1))]
    for record in recorded:
        store.commit_round(run_id, record)
    return recorded


def read_cells(text: str) -> list[list[tuple[str, str]]]:
    """The style and the letter of each cell of the grid, by row."""
    table = re.search(r'<table class="rxc.*?</table>', text, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr>.*?</tr>", table[0].partition("<tbody>")[2], re.DOTALL)
    return [re.findall(r'<td class="cell ([^"]*)"[^>]*>([^<]*)', row) for row in rows]


def test_sums_of_the_database_are_those_of_the_rounds(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        rounds = fill_mixed(store)
        found = store.details.sum_by_round("mixed-1")
        assert list(found) == [1, 2, 3, 4]
        for record in rounds[1:]:
            one, costs = found[record.number], sum_costs([record])
            assert {k: n for k, n in one.outcomes.items() if n} == Counter(map(find_outcome, record.client_records))
            assert (one.bytes_up, one.bytes_down) == (costs.bytes_up, costs.bytes_down)
            loss = compute_train_loss(record.client_records)
            assert (one.train_loss or math.nan) == pytest.approx(loss, nan_ok=True)
            assert sum(sum(each.values()) for each in one.by_class.values()) == costs.requested
        every = [one for record in rounds for one in record.client_records]
        for client in store.details.sum_by_client("mixed-1"):
            own = [one for one in every if one.client == client.client]
            assert {k: n for k, n in client.outcomes.items() if n} == Counter(map(find_outcome, own))
            assert client.seconds == pytest.approx(sum(one.seconds for one in own) / len(own))
        classes = store.details.sum_by_class("mixed-1")
        assert [one.device_class for one in classes] == ["phone", "tablet"]
        assert sum(one.bytes_up for one in classes) == sum(one.bytes_up for one in every)
        assert max(one.anonymous_memory or 0 for one in classes) == max(one.anonymous_memory or 0 for one in every)


def test_the_grid_has_the_outcome_of_every_client(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        rounds = fill_mixed(store)
        cells = read_cells(client.get("/runs/mixed-1").text)
    assert len(cells) == 7
    for number, record in enumerate(rounds):
        found = {one.client: find_outcome(one) for one in record.client_records}
        for row in range(7):
            outcome = found.get(row)
            expected = (f"o-{outcome}", LETTERS[outcome]) if outcome else ("none", "")
            assert cells[row][number] == expected if record.client_records and number else ("none", "")


def test_problems_are_listed_with_their_reason_and_paged(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        rounds = fill_mixed(store, rounds=30)
        problems = [
            (record.number, one.client)
            for record in reversed(rounds)
            for one in record.client_records
            if find_outcome(one) != "merged"
        ]
        found = []
        for page in range(1, -(-len(problems) // 50) + 1):
            text = client.get(f"/runs/mixed-1?problems={page}").text
            table = re.search(r"Clients that were late.*?</table>", text, re.DOTALL)
            assert table is not None
            rows = re.findall(r'<tr><td class="n">(\d+)</td><th scope="row">\w+ (\d+)</th>', table[0])
            found += [(int(number), int(one)) for number, one in rows]
    assert len(problems) > 100
    assert found == problems
    assert "no reply in time" in text


@pytest.mark.parametrize("colour", ["loss", "seconds", "bytes", "memory"])
def test_cells_are_coloured_by_a_measure(tmp_path: Path, colour: str) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        fill(store)
        cells = read_cells(client.get(f"/runs/film-1a2b?colour={colour}").text)
    assert [row[1][0] for row in cells] == ["q1", "q4", "q7"], "each measure grows with the number of the client"


def test_many_clients_are_shown_by_class_and_a_class_by_its_problems(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "many-1", recipe=RECIPE)
        store.commit_round("many-1", a_round(0))
        records = tuple(
            a_client_record(
                one, device_class="a/b" if one < 100 else ATTACK, status="error" if one in (7, 99) else "merged"
            )
            for one in range(110)
        )
        store.commit_round("many-1", a_round(1, client_records=records))
        text = client.get("/runs/many-1").text
        assert [[cell[1] for cell in row] for row in read_cells(text)] == [["", "2"], ["", "0"]]
        opened = client.get("/runs/many-1?class=a%2Fb").text
        assert "/runs/many-1?class=a%2Fb#clients" in text
    cells = read_cells(opened)
    assert len(cells) == 64
    assert [row[1][1] for row in cells] == ["F", "F"] + [""] * 62
    assert "the 64 with most problems of 100 shown" in opened


def test_more_than_sixty_rounds_are_shown_in_parts(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        fill(store, rounds=130)
        newest, first = client.get("/runs/film-1a2b").text, client.get("/runs/film-1a2b?from=1").text
    assert "Rounds 71 to 130 of 130" in newest
    assert "from=11#" in newest
    assert "Later rounds" not in newest
    assert "Rounds 1 to 60 of 130" in first
    assert {len(row) for row in read_cells(first)} == {60}


def test_stored_text_is_escaped_on_the_page_of_a_run(tmp_path: Path) -> None:
    recipe = json.dumps(
        {
            "name": ATTACK,
            ATTACK: ATTACK,
            "devices": [{"name": ATTACK, "memory": 5}],
            "stream": {"tasks": [{"name": ATTACK}]},
        }
    )
    record = a_client_record(0, device_name=ATTACK, device_class=ATTACK, status="error", reason=ATTACK)
    one = a_round(
        1,
        status="failed",
        reason=ATTACK,
        client_records=(record,),
        metrics=tuple(a_metric(0.5, split, ATTACK, "accuracy") for split in ("validation", "test", "border")),
        samples=(SampleRecord(number=1, prompt=ATTACK, text=ATTACK + "\x1b[31m\u202e", ended=False),),
        tasks=(TaskRecord(visit=1, name=ATTACK, first_round=1),),
        ends_visit=1,
        client_scores=(ClientScore(client=0, moment="before", name=ATTACK[:64], value=0.5, num_predictions=3),),
    )
    with open_page(tmp_path / "store.sqlite") as (store, client):
        run_id = ATTACK.replace("/", "|")  # no address has a slash in the place of an id
        start(store, run_id, name=ATTACK, recipe=recipe, engine=ATTACK[:32])
        store.commit_round(run_id, a_round(0))
        store.commit_round(run_id, replace(one, checkpoint=CheckpointRecord(path=ATTACK, sha256=ATTACK, bytes=1)))
        store.finish(run_id, "failed", ATTACK)
        [address] = set(re.findall(r'href="(/runs/%3C[^"]*)"', client.get("/runs").text))
        for query in ("", "?colour=loss", f"?class={ATTACK}", f"?order={ATTACK}", f"?from={ATTACK}"):
            text = client.get(address + query).text
            assert "<script" not in text
            assert "<img" not in text
            assert "\x1b" not in text
            assert "\u202e" not in text
        shown = client.get(address)
        assert shown.status_code == 200
        assert shown.text.count("&lt;script&gt;") > 15
        assert "settings that this fedtune does not know" in shown.text
        download = client.get(f"{address}/recipe.yaml")
    assert download.headers["content-type"].startswith("application/yaml")
    assert download.headers["content-disposition"].startswith("attachment")
    assert yaml.safe_load(download.text)["name"] == ATTACK


@pytest.mark.parametrize(
    "path",
    [
        "../film-1a2b",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/store.sqlite",
        "film",
        "film%001a2b",
        "%25",
        "film-1a2b/..%2f",
        "' OR 1=1 --",
    ],
)
def test_only_ids_of_runs_are_found(tmp_path: Path, path: str) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        fill(store)
        assert client.get(f"/runs/{path}").status_code == 404
        assert client.get(f"/runs/{path}/recipe.yaml").status_code == 404
        assert client.get("/runs/latest").status_code == 200


def test_a_run_without_rounds_says_why_its_parts_are_empty(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "queued-1", status="queued", recipe=RECIPE)
        text = client.get("/runs/queued-1").text
    for sentence in (
        "No round of this run has been scored yet.",
        "No client has been selected yet.",
        "No client has told its memory yet.",
        "Nothing has been sent yet.",
        "there is nothing to forget",
        "This run generated no text",
        "No checkpoint has been written yet.",
    ):
        assert sentence in text


def test_a_stream_shows_its_matrix_and_figures(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "stream-1", recipe=json.dumps({"stream": {"tasks": [{"name": "one"}, {"name": "two"}]}}))
        scores = [(0.1, 0.2), (0.9, 0.15), (0.6, 0.8)]
        for number, pair in enumerate(scores):
            border = tuple(a_metric(value, "border", name) for name, value in zip(("one", "two"), pair, strict=True))
            tasks = (TaskRecord(visit=number, name=("one", "two")[number - 1], first_round=number),) if number else ()
            store.commit_round("stream-1", a_round(number, metrics=border, tasks=tasks, ends_visit=number or None))
        text = client.get("/runs/stream-1").text
    table = re.search(r'<table class="heat">.*?</table>', text, re.DOTALL)
    assert table is not None
    assert re.findall(r'<td class="q\d( own)?">([^<]*)', table[0]) == [
        ("", ".100"),
        ("", ".200"),
        (" own", ".900"),
        ("", ".150"),
        ("", ".600"),
        (" own", ".800"),
    ]
    assert re.search(r"<dt>forgetting</dt><dd>\.300</dd>", text)


def test_changed_settings_are_those_of_the_recipe_file(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        start(store, recipe=RECIPE)
        changed = dict(list_changed_settings(store.run("latest")) or ())
    assert changed["train.lr"] == "0.006"
    assert changed["train.techniques"] == '[{"lora": {"trained_factors": "b-only"}}]'
    assert "train.optimiser" not in changed
    assert "seed" not in changed


@pytest.mark.parametrize("engine", ["in-process", "flower", "devices"])
def test_the_command_parses(tmp_path: Path, engine: str) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, _):
        start(store, engine=engine)
        words = shlex.split(make_command(store.run("latest")))
    command = cli.get_command(None, words[1])  # type: ignore[arg-type]
    assert command is not None
    parsed = command.make_context(words[1], words[2:])
    assert "film-1a2b.yaml" in map(str, parsed.params.values())


def test_an_address_of_a_run_returns(tmp_path: Path) -> None:
    query = RunQuery(run_id="a b", colour="loss", order="slowest", start=61, device_class="x&y", problems=3)
    assert query.url == "/runs/a%20b?colour=loss&order=slowest&from=61&class=x%26y&problems=3"
    given: dict[str, Any] = dict(pair.split("=") for pair in query.url.partition("?")[2].split("&"))
    assert RunQuery.parse("a b", given | {"class": "x&y"}) == query


@pytest.mark.parametrize("address", ["colour=red", "order=best", "from=-1", "problems=0", "problems=x"])
def test_what_a_run_cannot_show_is_refused(tmp_path: Path, address: str) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        fill(store)
        answer = client.get(f"/runs/film-1a2b?{address}")
        assert answer.status_code == 400
        assert "write" in answer.text


def test_values_that_are_no_numbers_break_no_page(tmp_path: Path) -> None:
    """Reports: one NaN metric made a run's page unavailable (mlflow 15535); odd names of metrics too (mlflow 1830)."""
    nan = math.nan
    broken = a_client_record(0, seconds=nan, train_loss=nan, update_norm=nan, anonymous_memory=None, peak_memory=0)
    names = ("a/b", "[x] {{ 7 * 8 }}", "values", "\u202eevil", "all")
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "bad-1", recipe='{"evaluation": {"main_metric": "MAP@k/[1]"}}')
        for number, value in enumerate((nan, -math.inf, nan)):
            scores = tuple(a_metric(value, "validation", domain, "MAP@k/[1]") for domain in names)
            records = (broken,) if number else ()
            store.commit_round("bad-1", a_round(number, seconds=nan, metrics=scores, client_records=records))
        start(store, "empty-1", recipe="{}")
        addresses = (
            "runs/bad-1",
            "runs/bad-1?colour=loss&order=slowest",
            "runs/bad-1?colour=memory&from=1",
            "runs/empty-1",
        )
        for address in (*addresses, "runs", "runs?sort=result", "runs?sort=-time", "compare?runs=bad-1,empty-1"):
            answer = client.get(f"/{address}")
            assert answer.status_code == 200
            assert not re.search(r">\s*(nan|inf|-inf)\b|=\"(nan|inf)", answer.text, re.IGNORECASE)
        assert "3 rounds have a value that is not a number" in client.get("/runs/bad-1").text


def test_a_hundred_domains_keep_their_labels_apart(tmp_path: Path) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "many-1")
        for number in range(3):
            scores = tuple(a_metric(index / 200, domain=f"domain {index:03}") for index in range(100))
            store.commit_round("many-1", a_round(number, metrics=(a_metric(0.5), *scores)))
        text = client.get("/runs/many-1").text
    labels = re.findall(r'<text class="end \w+" [^>]* y="([^"]*)"', text)
    assert len(labels) == 7, "the mean, five domains, and the training loss"
    assert min(map(float, labels)) >= 0
    assert "95 more curves are grey; the table names them." in text


def test_a_page_that_fails_says_so_with_the_headers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_page(tmp_path / "store.sqlite") as (store, client):
        start(store, "odd-1", recipe='{"devices": [1]}')
        answer = client.get("/runs/odd-1")
    assert answer.status_code == 500
    assert "the terminal of fedtune ui shows where" in answer.text
    assert "default-src" in answer.headers["content-security-policy"]
    assert "the page /runs/odd-1 failed" in caplog.text
