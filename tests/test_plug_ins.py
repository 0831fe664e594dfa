"""Units, metrics and callbacks of other packages: found, listed, validated, and refused where they are missing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

import fedtune
from fedtune.cli.methods import methods
from fedtune.cli.simulate import simulate
from fedtune.device.local_data import LocalData
from fedtune.device.problems import problem_of
from fedtune.errors import DataError, FedtuneError, RecipeError, RunError
from fedtune.library.plug_in_check import check_plug_in
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.task_settings import list_task_names
from fedtune.recipe.unit_registry import build_unit, find_unit_package, list_unit_names
from fedtune.tasks import get_task
from fedtune.training import get_run_context
from fedtune.training.metrics import list_metric_names, measure
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_codes import parse_problem
from tests.federations import TRIVIAL, trivial
from tests.installed import TECHNIQUE, install
from tests.tiny import llama, texts

TASK = '''"""Sorting: pictures into classes, as image-classification does."""

from typing import ClassVar

from fedtune.tasks.image_classification import ImageClassification


class Sorting(ImageClassification):
    """One picture, one class."""

    name: ClassVar[str] = "sorting"
'''
STEP = '''"""Half mean: half of the weighted mean."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging import CombineStep, MergeInput, Shape
from fedtune.merging.combine.mean import Mean


class HalfMean(CombineStep):
    """Half of the mean."""

    name: ClassVar[str] = "half-mean"
    scale: float = Field(0.5, gt=0)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """Scale the mean."""
        for rows in Mean().combine(name, shape, merge_inputs):
            yield rows * self.scale
'''
Install = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package on a path of its own."""

    def install_package(
        package: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str] | None = None
    ) -> None:
        monkeypatch.syspath_prepend(install(tmp_path / package, package, points, modules))

    return install_package


def test_a_technique_of_a_package_is_built_validated_and_trained(put: Install) -> None:
    assert "last-layer" not in list_unit_names("fedtune.techniques")
    put("half-tuned", {"fedtune.techniques": {"last-layer": "half_tuned_a:LastLayer"}}, {"half_tuned_a": TECHNIQUE})
    assert "last-layer" in list_unit_names("fedtune.techniques")
    assert find_unit_package("fedtune.techniques", "last-layer") == "half-tuned"
    assert find_unit_package("fedtune.techniques", "lora") == "fedtune"
    with pytest.raises(RecipeError, match=r"^here, last-layer: share is 2, but must be less than or equal to 1"):
        build_unit("fedtune.techniques", Unit(name="last-layer", settings={"share": 2}), "here")
    with pytest.raises(RecipeError, match=r"^here, last-layer: unknown key 'shares'; did you mean 'share'\?"):
        build_unit("fedtune.techniques", Unit(name="last-layer", settings={"shares": 1}), "here")
    prepared = fedtune.prepare(llama(tie_word_embeddings=False), "last-layer", task="text-generation")
    assert prepared.trainable == ["lm_head.weight"]
    prepared.model.train()(**texts(llama())).loss.backward()
    assert prepared.model.get_parameter("lm_head.weight").grad is not None


def test_a_federation_uses_a_task_a_technique_and_a_merge_step_of_packages(put: Install, home: Path) -> None:
    put("half-tuned", {"fedtune.techniques": {"last-layer": "half_tuned_b"}}, {"half_tuned_b": TECHNIQUE})
    points = {"fedtune.tasks": {"sorting": "sorter:Sorting"}, "fedtune.merging": {"half-mean": "sorter_steps"}}
    put("sorter", points, {"sorter": TASK, "sorter_steps": STEP})
    assert "sorting" in list_task_names()
    assert get_task("sorting").main_metric == "accuracy"
    recipe = trivial("task=sorting", "merge=[half-mean]", "train.techniques=last-layer")
    run = fedtune.simulate(recipe, workers=1)
    assert run.status == "completed"
    assert [unit.settings for unit in run.recipe.merge] == [{"scale": 0.5}]
    plain = fedtune.simulate(trivial(), workers=1)
    assert run.rounds[1].client_records[0].update_norm == plain.rounds[1].client_records[0].update_norm
    assert run.rounds[1].checkpoint != plain.rounds[1].checkpoint


BROKEN = "raise ImportError('needs libfoo')"


def test_the_list_shows_packages_and_survives_one_that_cannot_be_imported(put: Install) -> None:
    put("half-tuned", {"fedtune.techniques": {"last-layer": "half_tuned_c"}}, {"half_tuned_c": TECHNIQUE})
    put("brittle", {"fedtune.merging": {"shatter": "brittle_step:Shatter"}}, {"brittle_step": BROKEN})
    loud = 'def shout(event):\n    """Print every event."""\n'
    put("loud", {"fedtune.callbacks": {"shout": "loud_calls:shout"}}, {"loud_calls": loud})
    listed = CliRunner().invoke(methods, ["--json"], catch_exceptions=False)
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert (rows["last-layer"]["kind"], rows["last-layer"]["package"]) == ("technique", "half-tuned")
    assert rows["last-layer"]["settings"] == ["share: float = 1.0   not used"]
    assert (rows["text-generation"]["kind"], rows["text-generation"]["package"]) == ("task", "fedtune")
    assert (rows["shout"]["kind"], rows["shout"]["card"]) == ("callback", "Print every event.")
    assert "needs libfoo" in rows["shatter"]["problem"]
    assert rows["shatter"]["package"] == "brittle"
    text = CliRunner(env={"COLUMNS": "160"}).invoke(methods, catch_exceptions=False).stdout
    assert "half-tuned" in text
    assert "From the package half-tuned." in CliRunner().invoke(methods, ["last-layer"]).stdout
    said = (
        r"^merge: shatter is published by the package brittle, which cannot be imported \(ImportError: needs libfoo\)"
    )
    with pytest.raises(RecipeError, match=said):
        build_unit("fedtune.merging", Unit(name="shatter"), "merge")
    with pytest.raises(RecipeError, match="merging: shatter is published by the package brittle"):
        CliRunner().invoke(methods, ["shatter"], catch_exceptions=False)


@pytest.mark.parametrize("name", ["lora", "last-layer"])
def test_a_name_that_is_taken_is_refused_with_both_publishers(name: str, put: Install) -> None:
    put("one", {"fedtune.techniques": {name: "nowhere_a"}})
    first = "fedtune"
    if name == "last-layer":
        first = "one"
        put("two", {"fedtune.techniques": {name: "nowhere_b"}})
    other = "one" if first == "fedtune" else "two"
    with pytest.raises(RecipeError, match=rf"^here: {first} and the package {other} both publish '{name}'"):
        build_unit("fedtune.techniques", Unit(name=name), "here")
    assert build_unit("fedtune.techniques", Unit(name="full"), "here").name == "full"


def test_a_merge_of_models_uses_a_step_of_a_package_also_beside_a_broken_one(put: Install) -> None:
    put("brittle", {"fedtune.merging": {"shatter": "brittle_more:Shatter"}}, {"brittle_more": BROKEN})
    put("halves", {"fedtune.merging": {"half-mean": "halves_steps"}}, {"halves_steps": STEP})
    base = {"w": torch.zeros(2, 2)}
    tuned = [{"w": torch.full((2, 2), value)} for value in (2.0, 4.0)]
    merged = fedtune.merge(tuned, base=base, method="half-mean", weights=[0.5, 0.5])
    assert merged["w"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    with pytest.raises(RecipeError, match="there is no 'half-men'; did you mean 'half-mean'"):
        fedtune.merge(tuned, base=base, method="half-men")
    with pytest.raises(RecipeError, match="shatter is published by the package brittle, which cannot be imported"):
        fedtune.merge(tuned, base=base, method="shatter")


@pytest.mark.parametrize(
    ("value", "text", "why"),
    [
        ("odd_a:LastLayer", TECHNIQUE.replace('"last-layer"', '"lst-layer"'), "the class calls itself 'lst-layer'"),
        ("odd_b:Field", TECHNIQUE, "its entry point must name one Technique"),
        ("odd_c:HalfMean", STEP, "its entry point must name one Technique"),
        ("odd_d", "", "its entry point must name one Technique"),
    ],
)
def test_an_entry_point_that_names_something_else_is_refused(value: str, text: str, why: str, put: Install) -> None:
    put("odd", {"fedtune.techniques": {"last-layer": value}}, {value.partition(":")[0]: text})
    with pytest.raises(RecipeError, match=rf"^here: last-layer of the package odd is no unit that fits: {why}"):
        build_unit("fedtune.techniques", Unit(name="last-layer"), "here")


def test_metrics_of_packages_collide_and_break_in_a_sentence(put: Install) -> None:

    put("gauge", {"fedtune.metrics": {"f1": "gauge_a:f", "width": "gauge_b:f"}}, {"gauge_b": BROKEN})
    assert {"f1", "width"} <= set(list_metric_names())
    for name, said in {
        "f1": "fedtune and the package gauge both publish",
        "width": r"gauge, which cannot .*libfoo",
    }.items():
        with pytest.raises(RecipeError, match=said):
            measure([name], np.array([[0.5, 0.5]]), np.array([0]))


def test_a_device_refuses_a_recipe_whose_units_are_not_installed_there(put: Install, home: Path) -> None:
    """The recipe is made where the package is installed, and read where it is not."""
    recipe = trivial()
    absent = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"techniques": [Unit(name="last-layer")]})}
    )
    with pytest.raises(RecipeError, match="there is no 'last-layer'") as caught:
        LocalData("partition:0").get_context(TrainRequest(absent.model_dump_json(), 1, 0, "run-1", "[]"))
    assert problem_of(caught.value).text == "unit-unavailable"
    text = recipe.model_dump_json().replace('"image-classification"', '"sorting"')
    with pytest.raises(ValidationError) as refused:
        Recipe.model_validate_json(text)
    assert problem_of(refused.value).text == "unit-unavailable"
    problem = parse_problem("unit-unavailable")
    assert problem is not None
    assert "install the package that publishes it on the device" in problem.remote_sentence
    put("sorter", {"fedtune.tasks": {"sorting": "sorter_b:Sorting"}}, {"sorter_b": TASK})
    with pytest.raises(RecipeError, match="there is no 'sortin'; did you mean 'sorting'"):
        get_task("sortin")


CALLBACKS = """
seen = []


def note(event):
    seen.append(type(event).__name__)


class Stop:
    def __call__(self, event):
        import fedtune

        if isinstance(event, fedtune.RoundEnded) and event.record.number == 1:
            raise fedtune.StopRun


def fail(event):
    raise ValueError("disk gone")
"""


def test_callbacks_of_packages_are_called_by_name(put: Install, home: Path, tmp_path: Path) -> None:
    names = {"note": "loud_b:note", "stop": "loud_b:Stop", "fail": "loud_b:fail"}
    put("loud", {"fedtune.callbacks": names}, {"loud_b": CALLBACKS})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TRIVIAL, encoding="utf-8")
    command = [str(recipe), "--workers", "1", "--callback"]
    done = CliRunner().invoke(simulate, [*command, "note", "--callback", "stop"])
    assert "Aborted!" in done.output
    from loud_b import seen  # type: ignore[import-not-found]

    assert seen.count("RoundEnded") == 2
    [run] = fedtune.runs()
    assert run.status == "interrupted"
    assert fedtune.simulate(run, callbacks=["note"], workers=1).status == "completed"
    assert seen.count("RoundEnded") == 3
    with pytest.raises(RunError, match=r"the callback fail of the package loud failed \(ValueError: disk gone\)"):
        CliRunner().invoke(simulate, [*command, "fail"], catch_exceptions=False)
    with pytest.raises(RecipeError, match="callbacks: there is no 'stopp'; did you mean 'stop'"):
        fedtune.simulate(recipe, callbacks=["stopp"])


SOURCES = """
import numpy as np


def read_grid(name):
    random = np.random.default_rng(int(name))
    labels = random.integers(0, 2, 200)
    pixels = (random.random((200, 8, 8)) * 100 + 100 * labels[:, None, None]).astype(np.uint8)
    return {"train": {"image": pixels, "label": [("dark", "light")[number] for number in labels]}}


def read_wrongly(name):
    return {"train": {"image": [1, 2], "label": [1]}}


def fail(name):
    raise ConnectionError("no route to " + name)


def fetch(name):
    from fedtune.models.sample_models import make_logistic_regression_folder

    return make_logistic_regression_folder()
"""


def test_sources_of_packages_give_examples_and_models(put: Install, home: Path) -> None:
    data = {"grid": "sources_a:read_grid", "odd": "sources_a:read_wrongly", "far": "sources_a:fail"}
    models = {"shelf": "sources_a:fetch", "far": "sources_a:fail"}
    put("shelves", {"fedtune.data_sources": data, "fedtune.model_sources": models}, {"sources_a": SOURCES})
    run = fedtune.simulate(trivial("data.source=grid:7", "model.source=shelf:logistic"), workers=1)
    assert run.status == "completed"
    accuracy = [m.value for m in run.rounds[-1].metrics if (m.split, m.domain, m.name) == ("test", "all", "accuracy")]
    assert accuracy[0] > 0.9
    for key, source, said in [
        ("data", "odd:1", r"data.source: odd of the package shelves: train has columns of different lengths"),
        ("data", "far:away", r"data.source: far of the package shelves failed \(ConnectionError: no route to away\)"),
        ("model", "far:away", r"model.source: far of the package shelves failed \(ConnectionError: no route to away\)"),
        ("data", "gird:1", r"data.source is 'gird:1'; write .* disk:FOLDER, far:NAME, grid:NAME, odd:NAME or sample"),
        ("model", "shlef:1", r"model.source is 'shlef:1'; write .* sample:NAME, far:NAME, shelf:NAME or run:ID"),
    ]:
        with pytest.raises(FedtuneError, match=said):
            fedtune.simulate(trivial(f"{key}.source={source}"), workers=1)


PARTITION = '''"""Round robin: deal groups out in order."""

from typing import ClassVar

import numpy as np
from pydantic import Field

from fedtune.data import Partition


class RoundRobin(Partition):
    """Deal groups out in order."""

    name: ClassVar[str] = "round-robin"
    start: int = Field(0, ge=0)

    def assign(self, labels, sizes, num_clients, random):
        return (np.arange(len(sizes)) + self.start) % num_clients


class Beyond(RoundRobin):
    """Count from one."""

    name: ClassVar[str] = "beyond"

    def assign(self, labels, sizes, num_clients, random):
        return super().assign(labels, sizes, num_clients, random) + 1
'''


def test_a_partition_of_a_package_shares_the_examples(put: Install, home: Path) -> None:
    names = {"round-robin": "partitions_a:RoundRobin", "beyond": "partitions_a:Beyond"}
    put("dealer", {"fedtune.partitions": names}, {"partitions_a": PARTITION})
    recipe = trivial("data.partition={kind: round-robin, start: 1}")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    context = get_run_context(recipe.model_dump_json())
    owner = np.concatenate([np.full(len(rows), client) for client, rows in enumerate(context.client_rows)])
    order = np.argsort(np.concatenate(context.client_rows))
    assert owner[order][:8].tolist() == [1, 2, 3, 0, 1, 2, 3, 0]
    with pytest.raises(RecipeError, match=r"^data\.partition, round-robin: start is -1, but must be greater than"):
        trivial("data.partition={kind: round-robin, start: -1}")
    with pytest.raises(RecipeError, match=r"data\.partition\.kind is 'round-robbin', but must be one of"):
        trivial("data.partition={kind: round-robbin}")
    with pytest.raises(DataError, match="beyond must give a client from 0 to 3 for each of the"):
        _ = get_run_context(trivial("data.partition={kind: beyond}").model_dump_json()).client_rows
    text = recipe.model_dump_json().replace("round-robin", "somewhere-else")
    with pytest.raises(ValidationError) as refused:
        Recipe.model_validate_json(text)
    assert problem_of(refused.value).text == "unit-unavailable"


def test_a_partition_is_checked_too(put: Install) -> None:
    names = {
        "round-robin": "partitions_b:RoundRobin",
        "beyond": "partitions_b:Beyond",
        "iid": "partitions_b:RoundRobin",
    }
    put("dealer", {"fedtune.partitions": names}, {"partitions_b": PARTITION})
    assert [one.status for one in check_plug_in("round-robin")] == ["ok"]
    [found] = check_plug_in("beyond")
    assert (found.status, "must give a client from 0 to 2" in found.reason) == ("failed", True)
    [taken] = check_plug_in("iid")
    assert "data.partition: fedtune and the package dealer both publish 'iid'" in taken.reason
