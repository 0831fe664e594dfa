"""What is refused together with privacy, before anything is built or written; and what a run says of it afterwards."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fedtune.cli.main import cli
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import list_unit_names
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from fedtune.training import get_run_context
from tests.federations import execute, trivial
from tests.local_norms import text
from tests.private_federations import epsilons, private
from tests.recipe_examples import TEXT, refusal

REFUSED = {
    "federation.max_update_norm=1": "federation.max_update_norm: privacy.clipping_norm bounds every client update",
    "devices=[{count: 2}, {name: toy, count: 2, techniques: [bias]}]": "devices: toy has techniques of its own",
    "federation.asynchronous={buffer: 2}": "federation.asynchronous: an answer counts in rounds its client was",
    "evaluation.local_holdout=0.2": "evaluation.local_holdout: scores on what clients hold out are sent without noise",
    "merge=[mean, {aim: {statistics: clients}}]": "merge: statistics: clients sends activations without noise",
    "merge=[mean, {shrink: {factor: aim, statistics: clients}}]": "merge: statistics: clients sends activations",
}


@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.parametrize("setting", REFUSED)
def test_what_would_be_sent_without_noise_is_refused(where: str, setting: str) -> None:
    with pytest.raises(RecipeError) as caught:
        private(where, setting)
    assert str(caught.value).startswith(REFUSED[setting])


def combining() -> list[str]:
    """Merges that a recipe without privacy takes as they are."""
    found = []
    for name in list_unit_names("fedtune.merging"):
        try:
            trivial(f"merge=[{name}]")
        except RecipeError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("name", combining())
def test_the_servers_noise_goes_with_means_alone_and_the_clients_own_with_any_merge(name: str) -> None:
    private("client", f"merge=[{name}]")
    if name in ("mean", "linear"):
        private("server", f"merge=[{name}, {{shrink: {{factor: 0.5}}}}]")
    else:
        with pytest.raises(
            RecipeError, match=f"^merge: {name} is not a mean of client updates, .* privacy.noise_added_by=clients$"
        ):
            private("server", f"merge=[{name}]")


def test_a_recipe_that_was_not_resolved_is_refused_where_it_is_built() -> None:
    recipe = private("server").model_copy(update={"merge": [Unit(name="ties")]})
    with pytest.raises(RecipeError, match=r"^merge: ties is not a mean of client updates"):
        get_run_context(recipe.model_dump_json())


def test_many_merges_were_tried() -> None:
    assert {"mean", "linear", "ties", "sce", "geometric-median", "dare-linear"} < set(combining())


@pytest.mark.parametrize("step", ["rebasin", "repair"])
def test_steps_that_see_whole_models_are_refused_with_the_servers_noise(step: str) -> None:
    steps = f"merge=[{step}, mean]" if step == "rebasin" else f"merge=[mean, {step}]"
    with pytest.raises(RecipeError, match=f"^merge: {step} is not a mean of client updates"):
        private("server", steps)


@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.parametrize(
    ("techniques", "sentence"),
    [
        (
            "[full, batch-norm-statistics]",
            r"^privacy: full\+batch-norm-statistics trains .*\.running_mean, a batch norm's statistic",
        ),
        ("[dynamic-pruning: {density: 0.5, every: 2, until: 3}]", "^privacy: with dynamic-pruning clients send more"),
    ],
)
def test_techniques_that_send_more_than_deltas_are_refused(
    tmp_path: Path, where: str, techniques: str, sentence: str
) -> None:
    recipe = nets(tmp_path, f"train.techniques={techniques}", f"privacy.noise_added_by={where}")
    with pytest.raises(RecipeError, match=sentence):
        get_run_context(recipe.model_dump_json())
    get_run_context(recipe.model_copy(update={"privacy": None}).model_dump_json())


def nets(folder: Path, *overrides: str) -> Recipe:
    """A small net with batch norms."""
    settings = (
        "evaluation.local_holdout=0",
        "privacy.clipping_norm=1",
        "privacy.noise_multiplier=1",
        "train.techniques=[bias]",
        *overrides,
    )
    return resolve_recipe(parse_recipe(text(folder), "nets", settings))


def test_a_fixed_mask_sends_nothing_but_deltas(home: Path, tmp_path: Path) -> None:
    recipe = nets(tmp_path, "train.techniques=[dynamic-pruning: {density: 0.5, every: null}]", "federation.rounds=1")
    ended = execute(recipe)
    assert ended.run.status == "completed"
    assert len(epsilons(ended)) == 1


def test_settings_out_of_range_are_told_by_their_key() -> None:
    assert "privacy.clipping_norm is 0, but must be greater than 0" in refusal(
        TEXT, "privacy.clipping_norm=0", "privacy.noise_multiplier=1"
    )
    assert "privacy.target_delta is 1, but must be less than 1" in refusal(
        TEXT, "privacy.clipping_norm=1", "privacy.noise_multiplier=1", "privacy.target_delta=1"
    )
    assert "the key 'privacy.noise_multiplier' is missing" in refusal(TEXT, "privacy.clipping_norm=1")
    assert "allowed: clipping_norm, noise_added_by" in refusal(TEXT, "privacy.clipping_norm=1", "privacy.noize=1")


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(("where", "said"), [("server", "sees them in clear"), ("clients", "any two data sets")])
def test_a_run_and_its_export_say_what_was_spent(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, second = epsilons(execute(private(where)))
    assert f"epsilon {second:.4g} at delta 1e-05, noise by the {where}" in call("runs", "show", "latest").stdout
    shown = json.loads(call("runs", "show", "latest", "--json").stdout)
    assert shown["privacy"] == {"epsilon": second, "delta": 1e-05, "noise_added_by": where}
    call("export", "latest", "--round", "1", "-o", str(tmp_path / "model"))
    call("runs", "plot", "latest", "-o", str(tmp_path / "run.png"))
    assert (tmp_path / "run.png").stat().st_size > 10_000
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"epsilon {first:.4g} at delta 1e-05" in card
    assert said in card


def test_a_run_without_privacy_says_nothing_of_it(home: Path, tmp_path: Path) -> None:
    execute(trivial())
    assert "privacy" not in call("runs", "show", "latest").stdout
    assert json.loads(call("runs", "show", "latest", "--json").stdout)["privacy"] is None
    call("export", "latest", "-o", str(tmp_path / "model"))
    assert "ifferential" not in (tmp_path / "model" / "README.md").read_text()
