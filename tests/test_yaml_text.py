"""YAML that stands for more than settings need is refused in a sentence, wherever fedtune reads YAML."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.errors import FedtuneError, RecipeError, ServerError
from fedtune.recipe.yaml_file import parse_recipe, read_recipe
from fedtune.recipe.yaml_text import YamlError, load, load_with_lines
from fedtune.server.server_home import create_server_home, open_server_home
from tests.federations import TRIVIAL


def lists(depth: int, width: int = 9) -> str:
    """``width ** depth`` values behind ``depth`` anchors."""
    first = f"a0: &a0 [{', '.join(['x'] * width)}]\n"
    return first + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]\n" for level in range(1, depth)
    )


def merged_keys(depth: int, width: int = 9) -> str:
    """The same by merge keys, which copy pairs while a document is built."""
    first = "a0: &a0 {" + ", ".join(f"k{key}: x" for key in range(width)) + "}\n"
    return first + "".join(
        f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * width)}]}}\n" for level in range(1, depth)
    )


def keys(depth: int) -> str:
    """Aliases as keys of mappings."""
    return "a0: &a0 [x, x]\n" + "".join(
        f"a{level}: &a{level} {{? *a{level - 1} : *a{level - 1}}}\n" for level in range(1, depth)
    )


BOMBS = {"lists": lists(9), "merge keys": merged_keys(9), "keys": keys(40)}
OVER = "stands for more than 20000 values once its aliases are written out; use fewer"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_short_text_that_stands_for_millions_of_values_is_refused_at_once(bomb: str) -> None:
    assert len(bomb) < 2000
    with pytest.raises(YamlError, match=OVER):
        load(bomb)


@pytest.mark.timeout(60)
def test_every_reader_of_yaml_refuses_it_in_a_sentence(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = lists(8)
    assert len(bomb) < 1000
    path = tmp_path / "bomb.yaml"
    path.write_text(TRIVIAL + bomb, encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"bomb.yaml {OVER}"):
        read_recipe(path)
    value = "{" + ", ".join(bomb.splitlines()) + "}"
    with pytest.raises(RecipeError, match=f"--set train.*: the value {OVER}"):
        parse_recipe(TRIVIAL, "recipe", [f"train={value}"])
    place = create_server_home(["localhost"], "127.0.0.1:8443")
    (place.folder / "server.yaml").write_text(bomb, encoding="utf-8")
    with pytest.raises(ServerError, match=rf"server.yaml {OVER}"):
        open_server_home()
    (tmp_path / "trivial.yaml").write_text(TRIVIAL, encoding="utf-8")
    for words in (
        ["simulate", str(path)],
        ["submit", str(path)],
        ["data", "show", str(path)],
        ["profile", str(path)],
        ["profile", str(tmp_path / "trivial.yaml"), "--techniques", value],
        ["merge", str(path), "-o", str(tmp_path / "out")],
        ["merge", "a", "b", "--base-model", "c", "-o", str(tmp_path / "out"), "--set", f"density={value}"],
        ["merge", "a", "b", "--base-model", "c", "-o", str(tmp_path / "out"), "--relax", value],
    ):
        done = CliRunner().invoke(cli, words)
        said = str(done.exception) + done.output
        assert isinstance(done.exception, FedtuneError | SystemExit), (words, done.exception)
        assert done.exit_code
        assert "Traceback" not in said
        assert OVER in said or "write it as" in said, (words, said)


def test_anchors_that_are_used_as_people_use_them_are_kept() -> None:
    text = "base: &b {lr: 1, batch: 2}\nown: {<<: *b, lr: 3}\nlist: [*b, *b]\nempty: &e\nagain: *e\n"
    assert load(text) == yaml.safe_load(text)
    many = "a: &a {x: 1}\nb: [" + ", ".join(["*a"] * 5000) + "]"
    assert len(load(many)["b"]) == 5000


def test_a_text_that_no_settings_need_is_refused_by_its_length() -> None:
    with pytest.raises(YamlError, match="holds 300000 characters, and 262144 are allowed"):
        load("a" * 300_000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [*x]", "is not YAML: an alias stands inside itself"),
        ("&x {a: *x}", "is not YAML: an alias stands inside itself"),
        ("[" * 3000, "is not YAML: it is nested too deeply"),
        ("a: 1\n---\nb: 2", "is not YAML: expected a single document"),
        ("a: 1" + "0" * 5000, "is not YAML: Exceeds the limit"),
        ("a: 2020-13-45", "is not YAML: month must be in 1..12"),
        ("a: \x1b[2J", "is not YAML: unacceptable character"),
    ],
)
def test_what_is_no_yaml_is_told_in_one_line(text: str, said: str) -> None:
    with pytest.raises(YamlError) as caught:
        load(text)
    assert str(caught.value).startswith(said)
    assert str(caught.value).isprintable()


def test_lines_are_those_of_keys_and_items_also_behind_aliases() -> None:
    assert load_with_lines("a: 1\nb:\n  - 2\n  - c: 3\n")[1] == {
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 1): 4,
        ("b", 1, "c"): 4,
    }
    assert load_with_lines("") == (None, {})


def test_a_long_value_is_cut_in_the_message_that_names_it() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TRIVIAL.replace("lr: 0.03", f"lr: [{', '.join(['1'] * 4000)}]"), "a.yaml")
    assert len(str(caught.value)) < 400
