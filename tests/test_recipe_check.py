"""Recipes are made whole on the server, in a process that has torch; who submits one does not import it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.errors import RecipeError, ServerError
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.recipe_check import RecipeCheck
from fedtune.simulation import resolve_recipe
from tests.federations import TRIVIAL

SUBMIT = """
import sys
from fedtune.cli import operator_client
asked = []
operator_client.OperatorClient.request_json = lambda self, *call: asked.append(call) or {"run": "run-1"}
from fedtune.cli.main import cli
words = ["submit", "recipe.yaml", "--operator-file", "operator.json", "--set", "train.techniques=lora"]
cli(words, standalone_mode=False)
[(method, path, sent)] = asked
assert (method, path, list(sent["recipe"]["train"]["techniques"][0])) == ("POST", "runs", ["lora"])
print(*sorted(sys.modules), file=sys.stderr)
"""


def test_whoever_submits_a_recipe_imports_neither_torch_nor_flower(tmp_path: Path) -> None:
    from fedtune.server import certificate_authority

    (tmp_path / "recipe.yaml").write_text(TRIVIAL, encoding="utf-8")
    told = {
        "url": "https://server:1",
        "ca": certificate_authority.make_ca_certificate(certificate_authority.generate_private_key()).decode(),
        "key": "key",
    }
    (tmp_path / "operator.json").write_text(json.dumps(told))
    done = subprocess.run([sys.executable, "-c", SUBMIT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.splitlines()[-1].split())
    assert not imported & {"torch", "numpy", "flwr", "sqlalchemy", "transformers", "fedtune.training"}
    assert done.stdout.splitlines()[0] == "run       run-1"
    assert done.stderr.startswith("sending recipe.yaml to https://server:1, which checks it\n")


def test_a_recipe_comes_back_as_a_simulation_would_have_it_and_a_whole_one_as_it_is() -> None:
    recipe = parse_recipe(TRIVIAL, "trivial", ["merge=[ties]"])
    check = RecipeCheck()
    try:
        whole = check.whole(recipe)
        assert whole == resolve_recipe(recipe) != recipe
        assert check.whole(whole) == whole
        with pytest.raises(RecipeError, match=r"train\.techniques: there is no 'loar'; did you mean 'lora'\?"):
            check.whole(parse_recipe(TRIVIAL, "trivial", ["train.techniques=loar"]))
        assert check._process is not None
        before = check._process.pid
        check._process.kill()
        check._process.wait()
        assert check.whole(recipe) == whole, "one that was killed is started again"
        assert check._process.pid != before
    finally:
        check.close()


@pytest.mark.parametrize("script", ["", "print('nonsense')", "import time; time.sleep(60)", "print('{', flush=True)"])
def test_a_check_that_does_not_work_is_told_and_leaves_no_process(script: str) -> None:
    check = RecipeCheck((sys.executable, "-c", script), 0.5)
    with pytest.raises(ServerError, match="could not be checked on the server"):
        check.whole(parse_recipe(TRIVIAL, "trivial", []))
    assert check._process is None


def test_what_a_library_prints_is_no_answer() -> None:
    script = (
        "import fedtune.simulation.recipe_check as c\n"
        "c.check_recipe = lambda told: print('hello') or {'n': told}; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], input="1\n2\n", capture_output=True, text=True, check=True)
    assert done.stdout == '{"n": 1}\n{"n": 2}\n'
