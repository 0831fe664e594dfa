"""A recipe is checked alike by simulate and by a server, in a child process there; submit does not import torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.errors import FedtuneError, RecipeError, ServerError
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.gateway.operator_api import OperatorApi
from fedtune.server.recipe_check_child import reply_to
from fedtune.server.recipe_check_process import RecipeCheckProcess
from fedtune.simulation import resolve_recipe
from fedtune.tracking import Store
from tests import local_norms
from tests.federations import TRIVIAL

SUBMIT = """
import sys
from fedtune.cli import operator_client
asked = []
operator_client.OperatorClient.request_json = lambda self, *call, **_: asked.append(call) or {
    "run": "run-1", "plans": ["techniques of toy: lora\\x1b[2J"]
}
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
    assert done.stderr.startswith("sending recipe.yaml to https://server:1, which checks it\ntechniques of toy: lora")
    assert "\x1b" not in done.stderr


def test_a_recipe_comes_back_as_a_simulation_would_have_it_and_a_whole_one_as_it_is() -> None:
    recipe = parse_recipe(TRIVIAL, "trivial", ["merge=[ties]"])
    check = RecipeCheckProcess()
    try:
        whole = check.check_recipe(recipe)
        assert whole == resolve_recipe(recipe) != recipe
        assert check.check_recipe(whole) == whole
        with pytest.raises(RecipeError, match=r"train\.techniques: there is no 'loar'; did you mean 'lora'\?"):
            check.check_recipe(parse_recipe(TRIVIAL, "trivial", ["train.techniques=loar"]))
        assert check._process is not None
        before = check._process.pid
        check._process.kill()
        check._process.wait()
        assert check.check_recipe(recipe) == whole, "one that was killed is started again"
        assert check._process.pid != before
    finally:
        check.close()


@pytest.mark.parametrize("script", ["", "print('nonsense')", "import time; time.sleep(60)", "print('{', flush=True)"])
def test_a_check_that_does_not_work_is_told_and_leaves_no_process(script: str) -> None:
    check = RecipeCheckProcess((sys.executable, "-c", script), 0.5)
    with pytest.raises(ServerError, match="could not be checked on the server"):
        check.check_recipe(parse_recipe(TRIVIAL, "trivial", []))
    assert check._process is None


def test_what_a_library_prints_is_no_answer() -> None:
    script = (
        "import fedtune.server.recipe_check_child as c\n"
        "c.reply_to = lambda sent: print('hello') or {'n': sent}; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], input="1\n2\n", capture_output=True, text=True, check=True)
    assert done.stdout == '{"n": 1}\n{"n": 2}\n'


REFUSED: dict[str, tuple[str, ...]] = {
    "there is no 'loar'": ("train.techniques=loar",),
    "lora cannot be combined with full": ("train.techniques=lora+full",),
    "2 steps combine": ("merge=[mean, mean]",),
    "fedit takes pairs": ("merge=[fedit]",),
    "privacy.clipping_norm bounds every client update": (
        "federation.max_update_norm=1",
        "privacy={clipping_norm: 1, noise_multiplier: 1}",
    ),
    "tells nothing of a round": ("federation.asynchronous={buffer_size: 2}", "evaluation.local_holdout=0.2"),
    "none.csv": ("data.source=csv:none.csv",),
    "no-such-sample": ("model.source=sample:no-such-sample",),
    "accountant is not installed": ("privacy={clipping_norm: 1, noise_multiplier: 1}",),
}
"""Part of the sentence, and the settings that are refused with it."""
REFUSED_WITH_BATCH_NORMS: dict[str, tuple[str, ...]] = {
    "a batch norm's statistic": (
        "train.techniques=[full, batch-norm-statistics]",
        "evaluation.local_holdout=0",
        "privacy={clipping_norm: 1, noise_multiplier: 1}",
    ),
    "which train.techniques does not share": (
        "train.techniques=[bias]",
        "devices=[{count: 2}, {name: toy, count: 1, techniques: [full]}]",
    ),
    "leaves the server no whole model to score": ("evaluation.local_holdout=0",),
}


class ChecksInThisProcess:
    """The child's own function, through JSON as it travels, without the child."""

    def check_recipe(self, recipe: Any) -> Any:
        reply = reply_to(json.loads(recipe.model_dump_json()))
        if "refused" in reply:
            raise RecipeError(reply["refused"])
        raise AssertionError("it is not refused")


def refused_by_submit(path: Path, overrides: tuple[str, ...]) -> str:
    from fedtune.recipe.yaml_file import read_recipe

    nobody: Any = None
    with Store.open() as store:
        api = OperatorApi(store, nobody, nobody, nobody, nobody, nobody, cast("Any", ChecksInThisProcess()))
        sent = {"recipe": json.loads(read_recipe(path, overrides).model_dump_json())}
        with pytest.raises(FedtuneError) as caught:
            api.submit_run("ada", nobody, sent)
        assert store.runs() == []
    return str(caught.value)


def refused_by_simulate(path: Path, overrides: tuple[str, ...]) -> str:
    settings = [word for one in overrides for word in ("--set", one)]
    done = CliRunner().invoke(cli, ["simulate", str(path), *settings])
    assert isinstance(done.exception, FedtuneError), done.output
    return str(done.exception)


@pytest.mark.parametrize("part", [*REFUSED, *REFUSED_WITH_BATCH_NORMS])
def test_submit_refuses_what_simulate_refuses_in_the_same_words(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL if part in REFUSED else local_norms.text(tmp_path), encoding="utf-8")
    if part == "accountant is not installed":
        monkeypatch.setattr("fedtune.server.privacy_accounting.find_spec", lambda name: None)
    overrides = (REFUSED | REFUSED_WITH_BATCH_NORMS)[part]
    said = refused_by_simulate(path, overrides)
    assert part in said
    assert refused_by_submit(path, overrides) == said


def test_a_recipe_that_starts_from_a_run_is_refused_before_it_is_checked(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL, encoding="utf-8")
    assert "devices have no run store; export it" in refused_by_submit(path, ("model.source=run:film-1a2b@3",))
