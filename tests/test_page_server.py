"""``fedtune ui`` as a process: it serves, and Ctrl-C ends it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fedtune.tracking import Store, make_file_url
from tests.store_examples import fill, start

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(120)]


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    url = make_file_url(tmp_path / "store.sqlite")
    with Store.open(url) as store:
        fill(store)
        start(store, "queued-1", status="queued")
    command = [sys.executable, "-m", "fedtune.cli.main", "ui", "--no-browser", "--port", "0", "--store", url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found is not None
            address = found[0]
            assert "film-1a2b" in httpx.get(f"{address}runs").text
            assert httpx.get(f"{address}runs", headers={"host": "evil.example"}).status_code == 421
            assert httpx.post(f"{address}runs").status_code == 405
            with httpx.stream("GET", f"{address}runs/queued-1/events") as live:  # an open page does not hold it
                assert "event: run" in next(live.iter_text())
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 130
        finally:
            process.kill()
