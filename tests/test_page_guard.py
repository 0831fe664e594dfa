"""The page answers its own addresses only, with strict headers, and changes nothing."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from fedtune.cli.main import cli
from fedtune.errors import ServerError, StoreError
from fedtune.tracking import Store, make_file_url
from fedtune.web.application import make_application
from fedtune.web.page_key import KEY_COOKIE, make_page_key
from fedtune.web.page_server import is_loopback, make_page_url, open_page_socket
from fedtune.web.request_guard import SECURITY_HEADERS, is_known_host
from tests.page_examples import open_page
from tests.store_examples import fill


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_page(tmp_path_factory.mktemp("page") / "store.sqlite") as (store, client):
        fill(store)
        yield client


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8787", "localhost:1", "LOCALHOST", "[::1]:8787", "192.168.0.7", "10.0.0.1:80"]
)
def test_addresses_and_localhost_are_known(host: str) -> None:
    assert is_known_host(host, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["", "evil.example", "127.0.0.1.evil.example:8787", "localhost.evil.example", "[evil]", "0x7f.1"]
)
def test_a_name_of_another_site_is_refused(page: TestClient, host: str) -> None:
    assert not is_known_host(host, "127.0.0.1")
    answer = page.get("/runs", headers={"host": host})
    assert answer.status_code == 421
    assert "film" not in answer.text


def test_the_name_of_this_host_is_known() -> None:
    assert is_known_host("lab.example:8787", "Lab.example")


@pytest.mark.parametrize("path", ["/", "/runs", "/runs/film-1a2b", "/nowhere", "/static/page.css"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(page: TestClient, path: str, method: str) -> None:
    answer = page.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/runs", "/runs?sort=x", "/nowhere", "/static/page.css", "/static/none"])
def test_every_response_has_the_headers(page: TestClient, path: str) -> None:
    answer = page.get(path)
    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../application.py",
        "/static/%2e%2e/application.py",
        "/static/..%2fapplication.py",
        "/static//etc/passwd",
    ],
)
def test_static_files_are_only_those_of_the_page(page: TestClient, path: str) -> None:
    assert page.get(f"/static/{path}").status_code == 404


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    url = make_file_url(tmp_path / "store.sqlite")
    Store.open(url).close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(cli, ["ui", "--no-browser", "--port", str(port), "--store", url])
    assert isinstance(done.exception, ServerError)
    assert f"cannot listen on 127.0.0.1:{port}" in str(done.exception)
    assert "--port" in str(done.exception)


def test_a_store_that_is_missing_is_told_and_not_made(tmp_path: Path, home: Path) -> None:
    done = CliRunner().invoke(cli, ["ui", "--no-browser", "--store", make_file_url(tmp_path / "none" / "store.sqlite")])
    assert isinstance(done.exception, StoreError)
    assert "there is no run store at" in str(done.exception)
    assert not (tmp_path / "none").exists()
    done = CliRunner().invoke(cli, ["ui", "--no-browser"])
    assert isinstance(done.exception, StoreError)
    done = CliRunner().invoke(cli, ["ui", "--no-browser", "--store", "no url"])
    assert isinstance(done.exception, StoreError)
    assert "SQLAlchemy URL" in str(done.exception)


def test_a_store_of_a_newer_schema_is_told(tmp_path: Path) -> None:
    import sqlite3

    url = make_file_url(tmp_path / "store.sqlite")
    Store.open(url).close()
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    done = CliRunner().invoke(cli, ["ui", "--no-browser", "--store", url])
    assert isinstance(done.exception, StoreError)
    assert "upgrade fedtune" in str(done.exception)


def test_the_address_to_open_is_of_this_machine() -> None:
    with open_page_socket("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert make_page_url(listener, "127.0.0.1") == f"http://127.0.0.1:{port}/"
        assert make_page_url(listener, "0.0.0.0") == f"http://127.0.0.1:{port}/"
        assert make_page_url(listener, "::") == f"http://[::1]:{port}/"
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "lab")] == [1, 1, 1, 0, 0]


def test_a_page_with_a_key_shows_nothing_without_it(tmp_path: Path) -> None:
    with Store.open(make_file_url(tmp_path / "store.sqlite")) as store:
        fill(store)
        with TestClient(make_application(store, "lab.example", "the-key"), base_url="http://lab.example") as client:
            for path in ("/", "/runs", "/runs/film-1a2b", "/runs/film-1a2b/events", "/static/page.css", "/none"):
                for asked in (path, f"{path}?key=", f"{path}?key=the-ke", f"{path}?key=%C3%A9"):
                    answer = client.get(asked, headers={"cookie": f"{KEY_COOKIE}=wrong"}, follow_redirects=False)
                    assert answer.status_code == 401, asked
                    assert "film" not in answer.text
                    assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
            assert client.get("/runs?key=the-key", headers={"host": "evil.example"}).status_code == 421


def test_the_key_is_given_once_and_then_rests_in_a_cookie(tmp_path: Path) -> None:
    with Store.open(make_file_url(tmp_path / "store.sqlite")) as store:
        fill(store)
        with TestClient(make_application(store, "lab.example", "the-key"), base_url="http://lab.example") as client:
            first = client.get("//elsewhere.example?key=the-key", follow_redirects=False)
            assert (first.status_code, first.headers["location"]) == (303, "/runs")
            assert {"httponly", "samesite=strict"} <= set(first.headers["set-cookie"].lower().split("; "))
            assert client.get("/runs").status_code == 200


def test_keys_differ() -> None:
    assert len({make_page_key() for _ in range(9)}) == 9
