"""What operators may do by their role, operators and tokens listed and removed, the audit by pages, odd requests."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from fedtune.cli.main import cli
from fedtune.cli.operator_client import OperatorClient, connect_to_server
from fedtune.errors import ServerError
from fedtune.recipe.schema import Recipe
from fedtune.server.operator_files import write_operator_file
from fedtune.tracking import Store
from tests.federations import trivial
from tests.servers import Knocker, Server, serving
from tests.store_examples import start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("roles")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDTUNE_HOME", str(home))
        for name in ("FEDTUNE_STORE", "FEDTUNE_OPERATOR_FILE"):
            patched.delenv(name, raising=False)
        with serving(home) as served:
            yield served


@pytest.fixture
def connection(server: Server) -> Iterator[OperatorClient]:
    with server.operator() as made:
        yield made


def with_role(server: Server, folder: Path, role: str) -> OperatorClient:
    with Store.open() as store:
        write_operator_file(server.place, store.access, f"with-{role}", folder / f"{role}.json", role)
    return connect_to_server(folder / f"{role}.json")


def told(*words: str) -> Result:
    return CliRunner().invoke(cli, ["server", *words])


ASKED = {
    "read": [("GET", "runs"), ("GET", "devices"), ("GET", "audit")],
    "submit": [("POST", "runs"), ("POST", "runs/none/stop"), ("POST", "runs/none/resume")],
    "admin": [
        *(("POST", "tokens"), ("GET", "tokens"), ("DELETE", "tokens/0"), ("GET", "operators")),
        *(("DELETE", "operators/none"), ("DELETE", "devices/none"), ("POST", "devices/none/tags")),
    ],
}


@pytest.mark.parametrize("role", ASKED)
def test_a_role_allows_what_it_is_for_and_what_lesser_ones_allow(server: Server, tmp_path: Path, role: str) -> None:
    roles = list(ASKED)
    with with_role(server, tmp_path, role) as connection:
        for needed, calls in ASKED.items():
            for method, path in calls:
                said = ""
                try:
                    connection.request_json(method, path, {})
                except ServerError as error:
                    said = str(error)
                refused = f"operator with-{role} has the role {role}" in said
                assert refused == (roles.index(role) < roles.index(needed)), (method, path, said)
    if role == "read":
        assert server.refused("needs submit; ask an admin for another key")


def test_operators_are_listed_and_removed_but_not_the_last_admin(
    server: Server, connection: OperatorClient, tmp_path: Path
) -> None:
    ada = tmp_path / "ada.json"
    assert told("add-operator", "ada", "-o", str(ada), "--role", "read").exit_code == 0
    listed = json.loads(told("operators", "--json").output)
    assert {"local": "admin", "ada": "read"}.items() <= {one["name"]: one["role"] for one in listed}.items()
    assert "sha256" not in listed[0]
    with connect_to_server(ada) as hers:
        hers.request_json("GET", "runs")
        assert told("remove-operator", "ada").output == "removed: ada\n"
        assert "ada" not in told("operators").output
        with pytest.raises(ServerError, match="an unknown key"):
            hers.request_json("GET", "runs")
    with pytest.raises(ServerError, match="there is no operator 'ada'; see them with fedtune server operators"):
        connection.request_json("DELETE", "operators/ada")
    others = [one["name"] for one in json.loads(told("operators", "--json").output) if one["name"] != "local"]
    for name in others:
        connection.request_json("DELETE", f"operators/{name}")
    with pytest.raises(ServerError, match="'local' is the only admin; make another first"):
        connection.request_json("DELETE", "operators/local")


def test_unused_tokens_are_listed_and_removed(server: Server, connection: OperatorClient) -> None:
    for left in connection.request_json("GET", "tokens")["tokens"]:
        connection.request_json("DELETE", f"tokens/{left['token']}")
    first, second = server.token("one"), server.token()
    listed = json.loads(told("tokens", "--json").output)
    assert [one["device_name"] for one in listed] == [None, "one"]
    assert told("remove-token", listed[1]["token"]).output == f"removed: {listed[1]['token']}\n"
    assert told("tokens").output.count("any device") == 1
    answer = Knocker(server).enroll(first)
    assert (answer.status_code, answer.json()["error"]) == (
        403,
        "this token is not known here; ask the operator for a new one",
    )
    assert Knocker(server).enroll(second, "two").status_code == 200
    assert connection.request_json("GET", "tokens") == {"tokens": []}
    with pytest.raises(ServerError, match="there is no unused token"):
        connection.request_json("DELETE", f"tokens/{listed[0]['token']}")


def test_a_token_for_a_name_no_device_can_have_is_not_made(connection: OperatorClient) -> None:
    for name in ("No Name", "[/x]", "a" * 65, "-a"):
        with pytest.raises(ServerError, match="is not a valid device name"):
            connection.request_json("POST", "tokens", {"name": name})


def test_the_audit_comes_by_pages_and_since_a_moment(server: Server, connection: OperatorClient) -> None:
    for number in range(12):
        server.knock("GET", f"/fedtune/nothing-{number}")
    first = connection.request_json("GET", "audit?limit=5")
    assert (len(first["audit"]), first["more"]) == (5, True)
    second = connection.request_json("GET", f"audit?limit=5&before={first['audit'][-1]['id']}")
    numbers = [line["id"] for line in first["audit"] + second["audit"]]
    assert numbers == sorted(set(numbers), reverse=True)
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+", "%2B")
    assert connection.request_json("GET", f"audit?since={later}") == {"audit": [], "more": False}
    for query in ("limit=0", "limit=x", "before=-1", "since=soon"):
        with pytest.raises(ServerError, match=r"is not a positive whole number|is not a time"):
            connection.request_json("GET", f"audit?{query}")
    every = told("audit", "--all", "--since", "1h", "--limit", "2", "--json")
    assert len(json.loads(every.output)) >= 12
    assert told("audit", "--since", "yesterday").exception


def test_a_refusal_that_comes_again_is_one_line_with_a_count(server: Server, connection: OperatorClient) -> None:
    for _ in range(30):
        server.knock("GET", "/fedtune/again-and-again")
    lines = [one for one in connection.request_json("GET", "audit")["audit"] if "again-and-again" in one["message"]]
    assert [line["times"] for line in lines] == [30]
    assert "30, last" in " ".join(told("audit").output.split())


STRANGE = [
    ("GET", "/fedtune/%5B/nope%5D", None, 404),
    ("GET", "/fedtune/%1B%5D0;title%07%C2%9B31m%E2%80%AE", None, 404),
    ("POST", "/fedtune/enroll", b"[" * 3000, 400),
    ("POST", "/fedtune/enroll", b"[" * 900 + b"]" * 900, 400),
    ("POST", "/fedtune/enroll", b'{"a":' * 90_000, 400),
    ("POST", "/fedtune/enroll", b"1" * 400, 400),
    ("POST", "/fedtune/enroll", b"1" * 5000, 400),
    ("POST", "/fedtune/enroll", b"-1e999", 400),
    ("POST", "/fedtune/enroll", b"NaN", 400),
    ("POST", "/fedtune/enroll", b"\xff\xfe{", 400),
    ("POST", "/fedtune/enroll", b'{"secret": "\\ud800", "name": "x", "public_key": "y"}', 400),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), STRANGE)
def test_strange_requests_are_refused_and_told_and_shown_as_text(
    server: Server, connection: OperatorClient, method: str, path: str, body: bytes | None, status: int
) -> None:
    before = max((line["id"] for line in connection.request_json("GET", "audit")["audit"]), default=0)
    answer = server.knock(method, path, content=body)
    assert answer.status_code == status, answer.text
    lines = connection.request_json("GET", "audit")["audit"]
    assert any(line["id"] > before or line["times"] > 1 for line in lines if line["outcome"] == "refused")
    shown = told("audit")
    assert not shown.exception
    assert all(character.isprintable() or character == "\n" for character in shown.output)


PROFILES = [
    {"examples": "[/x]"},
    {"memory": 10**18},
    {"memory": -1},
    {"memory": True},
    {"labels": {"a": 1.5}},
    {"labels": {str(number): 1 for number in range(2000)}},
    {"dtypes": "float32"},
    ["memory"],
    None,
]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_that_is_not_plausible_is_refused(
    server: Server, connection: OperatorClient, profile: object
) -> None:
    knocker = Knocker(server)
    name = f"profile-{PROFILES.index(profile)}"
    assert knocker.enroll(server.token(name)).status_code == 200
    assert knocker.signed("/fedtune/device/profile", json=profile).status_code == 400
    assert told("devices").exit_code == 0
    [found] = [one for one in connection.request_json("GET", "devices")["devices"] if one["name"] == name]
    assert found["profile"] == {}


def test_what_a_profile_names_is_cleaned_before_it_is_kept(server: Server, connection: OperatorClient) -> None:
    knocker = Knocker(server)
    assert knocker.enroll(server.token("odd")).status_code == 200
    profile = {"memory": 1, "labels": {"[/x]\x1b]0;a\x07": 3}, "later": [1]}
    assert knocker.signed("/fedtune/device/profile", json=profile).status_code == 200
    [found] = [one for one in connection.request_json("GET", "devices")["devices"] if one["name"] == "odd"]
    assert found["profile"] == {"memory": 1, "labels": {"[/x]\\x1b]0;a\\x07": 3}}


def test_a_round_number_that_is_none_is_refused_and_told(server: Server) -> None:
    with Store.open() as store:
        start(store, "some-run")
    key = json.loads(server.place.operator_file.read_text())["key"]
    transport = httpx.HTTPTransport(verify=server.trust, local_address="127.0.0.9")  # its lines are counted apart
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, transport=transport, headers=headers) as client:
        for number in ("x", "1" * 5000, "%5B/%5D", "-"):
            answer = client.get(f"/fedtune/runs/latest?after={number}")
            assert (answer.status_code, "is not a round number" in answer.text) == (400, True)
        assert client.get("/fedtune/runs/latest?after=-1").status_code == 200
    assert server.refused("is not a round number")


def test_a_run_that_is_submitted_directly_is_checked_and_made_whole(server: Server, connection: OperatorClient) -> None:
    knocker = Knocker(server)
    assert knocker.enroll(server.token("for-runs")).status_code == 200
    recipe = trivial("devices=[{name: any, count: 1, memory: 64MB}]").model_dump(mode="json")
    recipe["train"]["techniques"] = [{"name": "nonsense", "settings": {}}]
    with pytest.raises(ServerError, match="nonsense"):
        connection.request_json("POST", "runs", {"recipe": recipe})
    recipe["train"]["techniques"] = [{"name": "full", "settings": {}}]
    run = connection.request_json("POST", "runs", {"recipe": recipe})["run"]
    with Store.open() as store:
        kept = Recipe.model_validate_json(store.run(run).recipe)
    assert [unit.name for unit in kept.train.techniques] == ["full"]
    connection.request_json("POST", f"runs/{run}/stop")
