"""A recipe names what another package publishes, and a device, a server or a simulation lacks that package."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import fedtune
from fedtune.device.client_app import train_round_and_keep_errors
from fedtune.device.problems import problem_of
from fedtune.device.trainer import Trainer
from fedtune.device.trainer_channel import Frame
from fedtune.errors import RecipeError
from fedtune.flower.exchange import make_train_messages
from fedtune.flower.message_identity import set_node_identity
from fedtune.flower.train_messages import read_train_request
from fedtune.recipe.required_plug_ins import (
    decode_plug_ins,
    describe_plug_ins,
    encode_plug_ins,
    list_required_plug_ins,
    require_plug_ins,
)
from fedtune.server.bases import Bases
from fedtune.server.class_payloads import ClassPayload
from fedtune.server.client_device import ClientDevice
from fedtune.server.recipe_check_child import reply_to
from fedtune.server.replies import ExpectedReply, receive_update
from fedtune.server.sending import Sending
from fedtune.training import get_run_context
from fedtune.wire.client_update import TrainRequest, pack
from fedtune.wire.error_codes import TRAINING_FAILED
from tests.federations import trivial
from tests.installed import TECHNIQUE, install
from tests.servers import ended, joined, serving
from tests.test_deployment import submit

NEEDED = "last-layer of the package half-tuned, width of the package gauge"
DETAIL = (
    "the recipe names 'last-layer', which the package half-tuned publishes in fedtune.techniques, but half-tuned is "
    "not installed here; install half-tuned"
)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """A technique and a metric, each in a package of its own; the folders by package."""
    set_node_identity(1)
    folders = {
        "half-tuned": install(
            tmp_path / "a", "half-tuned", {"fedtune.techniques": {"last-layer": "half_away"}}, {"half_away": TECHNIQUE}
        ),
        "gauge": install(
            tmp_path / "b",
            "gauge",
            {"fedtune.metrics": {"width": "gauge_away:width"}},
            {"gauge_away": "def width(probabilities, labels):\n    return 0.0\n"},
        ),
    }
    for folder in folders.values():
        monkeypatch.syspath_prepend(folder)
    return {name: str(folder) for name, folder in folders.items()}


def begin_sending(folder: Path) -> Sending:
    holdout = "evaluation={local_holdout: 0.2, metrics: [width]}"
    context = get_run_context(trivial("train.techniques=last-layer", holdout).model_dump_json())
    return Sending(context, "run-1", Bases(context, folder, {}, []))


def test_a_device_names_the_package_that_it_lacks_and_so_does_the_server(
    installed: Mapping[str, str], home: Path, tmp_path: Path
) -> None:
    """The request is made where the packages are installed, and answered where they are not."""
    sending = begin_sending(tmp_path)
    assert describe_plug_ins(sending.plug_ins) == NEEDED
    request = replace(sending._request, round=1)
    message = make_train_messages([0], [2], request, pack({}))[0]
    fields = {name: value for name, value in asdict(request).items() if value is not None}
    sys.path.remove(installed["half-tuned"])
    device = Trainer("partition:0", 10**12, 0)
    answer = device.run_request(Frame(fields, pack({})), lambda: pytest.fail("it got as far as training"))
    assert answer.header == {"kind": "failed", "problem": "unit-unavailable", "detail": DETAIL}
    reply = train_round_and_keep_errors(message, Context(0, 2, {}, RecordDict(), {}))  # on a stock SuperNode
    assert (reply.error.code, reply.error.reason) == (TRAINING_FAILED, "unit-unavailable")
    expected = ExpectedReply(0, ClientDevice("toy"), ClassPayload({}, {}, {}), plug_ins=sending.plug_ins)
    record, update = receive_update(reply, expected, tmp_path)
    assert (record.status, update) == ("error", None)
    assert record.reason.startswith("it lacks a technique, task, merge step or partition that the recipe names")
    assert record.reason.endswith(f"; the recipe needs {NEEDED}")


def test_a_package_of_a_metric_is_named_too(installed: Mapping[str, str], home: Path, tmp_path: Path) -> None:
    required = decode_plug_ins(begin_sending(tmp_path)._request.plug_ins)
    require_plug_ins(required)
    sys.path.remove(installed["gauge"])
    with pytest.raises(RecipeError, match=r"^the recipe names 'width', which the package gauge publishes") as refused:
        require_plug_ins(required)
    assert problem_of(refused.value).text == "metric-unavailable"


def test_a_request_without_plug_ins_has_no_further_field() -> None:
    set_node_identity(1)
    assert list_required_plug_ins(trivial()) == ()
    request = TrainRequest("{}", 1, 0, "run-1", plug_ins=encode_plug_ins(()))
    [message] = make_train_messages([0], [2], request, b"").values()
    assert "plug_ins" not in read_train_request(message.content)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train", {"techniques": ["last-layer"], "lr": 0.1, "local_steps": 1}, "techniques: there is no 'last-layer'"),
        ("merge", ["half-mean"], "merge: there is no 'half-mean'"),
        ("task", "sorting", "task: there is no 'sorting'"),
    ],
)
def test_a_simulation_and_a_server_refuse_the_recipe(key: str, value: object, said: str, home: Path) -> None:
    recipe = {**trivial().model_dump(mode="json"), key: value}
    with pytest.raises(RecipeError, match=said):
        fedtune.simulate(recipe, workers=1)
    assert len(fedtune.runs()) == 0
    assert said in reply_to(recipe)["refused"]  # what the server answers to a recipe that is submitted


@pytest.mark.slow
@pytest.mark.deployed
def test_a_deployed_device_refuses_before_training_and_the_others_go_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    folder = install(
        tmp_path / "a", "half-tuned", {"fedtune.techniques": {"last-layer": "half_gone"}}, {"half_gone": TECHNIQUE}
    )
    monkeypatch.syspath_prepend(folder)
    recipe = trivial("train.techniques=last-layer", "devices=[{count: 2}]", "federation.quorum=1")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with serving(home) as server, joined(server, tmp_path, "partition:0", "partition:1", PYTHONPATH="") as devices:
        devices[0].process.terminate()
        devices[0].process.wait()
        devices[0].more = {"PYTHONPATH": str(folder)}
        devices[0].again()
        found = ended(server, submit(server, recipe))
        said = [device.log for device in devices]
    assert found["status"] == "completed", found["reason"]
    records = {one["status"]: one for one in found["rounds"][1]["client_records"]}
    assert records.keys() == {"merged", "error"}
    assert records["error"]["reason"].endswith("; the recipe needs last-layer of the package half-tuned")
    assert "trained 20 examples" in said[0]
    assert "trained" not in said[1]
    assert f"failed: {DETAIL}" in said[1]
