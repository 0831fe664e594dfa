"""What keeps a device joined and a server up: units that systemd reads as meant, and an install that needs no index."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from packaging.requirements import Requirement

from fedtune.cli.main import cli
from fedtune.errors import DataError, FedtuneError
from fedtune.server.server_home import create_server_home
from fedtune.server.server_settings import ServerSettings
from fedtune.shipped import SHIPPED, shipped_folder
from fedtune.systemd_units import service
from fedtune.wheel import write_wheel

ROOT = Path(__file__).parents[1]
SHIPPED_FILES = sorted(
    path
    for name in ("server", "clients")
    for path in shipped_folder(name).iterdir()
    if path.is_file() and path.suffix != ".py"
)

ODD = ["plain", "two words", "100%", "%h $HOME ${x}", "a;b #c", "dash - dash", "é 漢"]

PLACES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))


def holds(line: str, system: str, machine: str) -> bool:
    """Whether a line of a list counts on such a machine."""
    marker = Requirement(line).marker
    return marker is None or marker.evaluate({"sys_platform": system, "platform_machine": machine})


def packaged(folder: Path, source: str, *options: str) -> Result:
    return CliRunner().invoke(cli, ["device", "package", "--data", source, "--user", "pi", "-o", str(folder), *options])


def values(unit: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.splitlines() if line.startswith(f"{key}=")]


def read_words(text: str, *, variables: bool = False) -> list[str]:
    """Words of a unit's line, by systemd.syntax(7): quotes and backslashes first, then specifiers and variables."""
    words: list[str] = []
    word, quote, escaped = "", "", False
    for character in text + " ":
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character == '"':
            quote = character
        elif character == " ":
            words, word = ([*words, word] if word else words), ""
        else:
            word += character
    assert not quote
    for read in words:
        assert "%" not in read.replace("%%", ""), "a specifier"
        assert not variables or "$" not in read.replace("$$", ""), "a variable"
    words = [read.replace("%%", "%") for read in words]
    return [read.replace("$$", "$") for read in words] if variables else words


@pytest.mark.parametrize("name", ODD)
def test_a_unit_says_what_was_meant_whatever_the_paths_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home, data = tmp_path / f"home {name}", tmp_path / name
    data.mkdir()
    (data / "reviews.csv").write_text("text,label\na,b\n")
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    monkeypatch.chdir(data)
    done = packaged(tmp_path / "out", "csv:reviews.csv", "--memory", "512MB")
    assert done.exit_code == 0, done.output
    unit = (tmp_path / "out" / "fedtune-device.service").read_text()
    source = f"csv:{data}/reviews.csv"
    command = [
        str(Path(sys.executable).parent / "fedtune"),
        "device",
        "join",
        "--data",
        source,
        "--memory",
        "512000000",
    ]
    [line] = values(unit, "ExecStart")
    assert read_words(line, variables=True) == command
    assert [read_words(line) for line in values(unit, "Environment")] == [[f"FEDTUNE_HOME={home}"]]
    assert [read_words(line) for line in values(unit, "ReadWritePaths")] == [[str(home)]]
    assert values(unit, "User") == ["pi"]
    docker = (tmp_path / "out" / "Dockerfile").read_text()
    [started] = [line.removeprefix("CMD ") for line in docker.splitlines() if line.startswith("CMD ")]
    assert json.loads(started) == ["fedtune", *command[1:]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_itself_finds_nothing_wrong_with_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home 100% of it"))
    create_server_home(["localhost"], "127.0.0.1:8443")
    assert packaged(tmp_path / "out", "partition:0").exit_code == 0
    made = CliRunner().invoke(cli, ["server", "package", "--user", "daemon", "-o", str(tmp_path / "out")])
    assert made.exit_code == 0, made.output
    for unit in (tmp_path / "out").glob("*.service"):
        unit.write_text(unit.read_text().replace("User=pi", "User=daemon"))
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        told = [line for line in done.stderr.splitlines() if unit.name in line]
        assert not told, told


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_a_program_whose_folder_has_an_odd_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "EPS%3AHello $x y"
    folder.mkdir()
    shutil.copy("/bin/true", folder / "fedtune")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    unit = tmp_path / "odd.service"
    words = ["join", "--data", "csv:/a %h/$b"]
    unit.write_text(service("clients/fedtune-device.service", words, "daemon", tmp_path / "100% $home"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert unit.name not in done.stderr


def test_no_service_is_root_s_and_a_user_without_a_home_needs_one_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*argv: str) -> str:
        done = CliRunner().invoke(cli, [*argv, "-o", str(tmp_path / "out")])
        assert isinstance(done.exception, FedtuneError)
        assert not (tmp_path / "out").exists(), "nothing half-written"
        return str(done.exception)

    for command in (["device", "package", "--data", "partition:0"], ["server", "package"]):
        assert "does not run as root; name the user" in refused(*command, "--user", "root")
        assert "write the name of a user" in refused(*command, "--user", "a b\nExecStart=/bin/sh")
    assert "there is no server in" in refused("server", "package", "--user", "pi")
    monkeypatch.delenv("FEDTUNE_HOME")
    assert "set FEDTUNE_HOME" in refused("device", "package", "--data", "partition:0", "--user", "nobody-is-called-so")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / 'a"quote'))
    assert "rename it" in refused("device", "package", "--data", "partition:0", "--user", "pi")


def test_data_that_is_not_there_is_told_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    done = packaged(tmp_path / "out", "csv:nowhere.csv")
    assert isinstance(done.exception, DataError)
    assert not (tmp_path / "out").exists()


def test_no_token_is_on_a_command_line_and_the_container_is_not_root(home: Path, tmp_path: Path) -> None:
    (tmp_path / "my reviews.csv").write_text("text,label\na,b\n")
    packaged(tmp_path, f"csv:{tmp_path}/my reviews.csv")
    docker = (tmp_path / "Dockerfile").read_text()
    assert "--token TOKEN" not in docker
    assert "docker run -it --rm -v fedtune:/var/lib/fedtune fedtune-device fedtune device enrol --token -" in docker
    assert f"-v '{tmp_path}/my reviews.csv:{tmp_path}/my reviews.csv:ro'" in docker, "it is where --data says"
    assert "\nUSER fedtune\n" in docker
    assert f"COPY requirements.txt fedtune-{version('fedtune')}-py3-none-any.whl ./" in docker


def test_a_servers_container_listens_where_the_server_does(home: Path, tmp_path: Path) -> None:
    create_server_home(["lab.example", "10.0.0.5"], "0.0.0.0:9443")
    done = CliRunner().invoke(cli, ["server", "package", "--user", "pi", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    wheel = f"fedtune-{version('fedtune')}-py3-none-any.whl"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"fedtune-server.service", "fedtune-server.Dockerfile", wheel}
    assert {Path(line).name for line in done.output.splitlines()} == written
    docker = (tmp_path / "out" / "fedtune-server.Dockerfile").read_text()
    assert "fedtune server init --hostname lab.example --hostname 10.0.0.5 --listen 0.0.0.0:9443" in docker
    lines = [line for line in docker.splitlines() if not line.startswith("#")]
    words = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    assert words["COPY"] == f"{wheel} ./"
    assert words["RUN"] == "useradd --system --create-home --home-dir /var/lib/fedtune fedtune"
    assert lines.index("USER fedtune") < lines.index('CMD ["fedtune", "server", "up"]')
    assert words["EXPOSE"] == "9443"
    command = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    compile(command[2], "the health check", "exec")
    assert "https://127.0.0.1:9443/health" in command[2]


def test_a_server_yaml_that_does_not_hold_is_told_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    (place.folder / "server.yaml").write_text("listen: nowhere\n")
    done = CliRunner().invoke(cli, ["server", "package", "--user", "pi", "-o", str(tmp_path / "out")])
    assert isinstance(done.exception, FedtuneError)
    assert "listen" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_explains_itself_and_every_blank_of_it_is_filled(path: Path) -> None:
    text = path.read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    settings = [line for line in text.splitlines() if line.strip() and not line.startswith(("#", "["))]
    assert comments
    assert text.startswith("#"), "its first line says how it is used"
    assert len(comments) >= min(len(settings), 4)
    filled = re.sub(r"\$\{[a-z]+\}", "", text)
    assert "$" not in filled, "a template of string.Template: another dollar would be refused or lost"


def test_the_examples_of_the_top_level_are_those_that_are_written(home: Path, tmp_path: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    for command in (["server", "package"], ["device", "package", "--data", "partition:0"]):
        assert CliRunner().invoke(cli, [*command, "--user", "pi", "-o", str(tmp_path)]).exit_code == 0
    written = {"server.yaml": place.folder / "server.yaml", "server/Dockerfile": tmp_path / "fedtune-server.Dockerfile"}
    for path in SHIPPED_FILES:
        found = written.get(path.name) or written.get(f"{path.parent.name}/{path.name}") or tmp_path / path.name
        fixed = [line for line in path.read_text().splitlines() if "${" not in line]
        assert set(fixed) <= set(found.read_text().splitlines())
        assert "${" not in found.read_text()


def test_every_setting_of_a_server_stands_in_its_example_with_its_default(home: Path) -> None:
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    text = (place.folder / "server.yaml").read_text()
    for name, field in ServerSettings.model_fields.items():
        [line] = [line for line in text.splitlines() if re.match(rf"(# )?{name}:", line)]
        before = text.splitlines()[text.splitlines().index(line) - 1]
        assert before.startswith("# ") or line.startswith("# "), "a comment says what it does"
        if field.default is not None:
            assert yaml.safe_load(line)[name] == field.default


def test_the_list_names_the_index_of_its_torch_and_fedtune_from_the_wheel_beside_it(home: Path, tmp_path: Path) -> None:
    packaged(tmp_path, "partition:0")
    lines = [line for line in (tmp_path / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu", "of this line pip takes no marker"
    assert not [line for line in lines[1:] if line.startswith("-")]
    assert "INDEX" not in (tmp_path / "Dockerfile").read_text(), "the list has it"
    wheel = f"./fedtune-{version('fedtune')}-py3-none-any.whl"
    assert wheel in lines
    assert (tmp_path / wheel).exists()
    number = version("torch").partition("+")[0]
    assert not [line for line in lines if line.startswith("fedtune==")]
    local = [line for line in lines if "+" in line]
    assert local == [line for line in lines if line.startswith(f"torch=={number}+cpu;")]
    chosen = {place: [line for line in lines if line.startswith("torch==") and holds(line, *place)] for place in PLACES}
    assert {place: [line.partition(";")[0] for line in chosen[place]] for place in PLACES} == {
        ("linux", "x86_64"): [f"torch=={number}+cpu"],
        ("linux", "aarch64"): ["torch==2.10.0"],
        ("darwin", "arm64"): [f"torch=={number}"],
        ("win32", "AMD64"): [f"torch=={number}"],
    }


def test_the_wheel_installs_without_an_index_and_holds_every_file(tmp_path: Path) -> None:
    wheel, again = write_wheel(tmp_path), write_wheel(tmp_path / "again")
    assert wheel.read_bytes() == again.read_bytes()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "there")]
    done = subprocess.run([*pip, "--quiet", f"./{wheel.name}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = "import fedtune, fedtune.device.node, fedtune.server.server_home; print(fedtune.__file__)"
    first = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
    shown = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, env=first)
    assert shown.stdout.strip() == str(tmp_path / "there" / "fedtune" / "__init__.py"), shown.stderr
    assert (tmp_path / "there" / "bin" / "fedtune").exists()
    assert {path.name for path in (tmp_path / "there").glob("*") if path.suffix != ".dist-info"} == {"fedtune", "bin"}
    assert (tmp_path / "there" / "fedtune" / "shipped" / "migrations" / "script.py.mako").exists()
    page = tmp_path / "there" / "fedtune" / "web"
    assert (page / "templates" / "parts" / "runs_table.html").exists()
    assert (page / "static" / "page.css").exists()
    script = "from fedtune.tracking import Store; Store.open('sqlite:///store.sqlite').close()"
    command = [sys.executable, "-P", "-c", script]
    store = subprocess.run(command, capture_output=True, text=True, env=first, cwd=tmp_path, check=False)
    assert store.returncode == 0, store.stderr
    assert not [name for name in read_wheel(wheel) if "__pycache__" in name or ".." in name or name[0] == "/"]


def test_the_projects_own_backend_installs_one_package_the_same_as_ours(tmp_path: Path) -> None:
    """The source distribution is built first and the wheel from it, as pip does it without a checkout."""
    pytest.importorskip("hatchling", reason="the build backend is not installed; pip install -e .[dev]")
    source = ROOT
    for target in ("sdist", "wheel"):
        command = [sys.executable, "-P", "-m", "hatchling", "build", "-t", target, "-d", str(tmp_path)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if target == "sdist":
            [archive] = tmp_path.glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                opened.extractall(tmp_path / "source", filter="data")
            [source] = (tmp_path / "source").iterdir()
    for name in SHIPPED:
        assert (source / name).is_dir()
    [built] = tmp_path.glob("*.whl")
    files = read_wheel(built)
    information = f"fedtune-{version('fedtune')}.dist-info"
    assert {name.partition("/")[0] for name in files} == {"fedtune", information}
    assert {name.split("/")[2] for name in files if name.startswith("fedtune/shipped/")} == set(SHIPPED)
    ours = read_wheel(write_wheel(tmp_path / "ours"))
    package = {name: content for name, content in ours.items() if name.startswith("fedtune/")}
    assert package == {name: content for name, content in files.items() if name.startswith("fedtune/")}
    assert ours[f"{information}/entry_points.txt"].strip() == files[f"{information}/entry_points.txt"].strip()


def read_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}
