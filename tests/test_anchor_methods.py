"""EWC and LwF in whole runs: what they do to a stream, what they refuse, and that a resumed run has the same bits."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.continual import Border, MethodRound, MethodSetup, Place, StreamPlan, TaskUpload, mask_classes
from fedtune.continual._distillation import compute_distillation_loss
from fedtune.continual.ewc import Ewc
from fedtune.continual.lwf import Lwf
from fedtune.device.client_app import app
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.server.server_app import run_to_completion
from fedtune.server.task_memory import list_sent_memory
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tasks import get_task
from fedtune.tracking import Store, claim_run
from fedtune.tracking.rollback import rollback_run
from tests.federations import Ended, execute, outcome, silent, trivial, words
from tests.test_fisher_sums import Examples, Linear

DIGITS = "stream={setting: class, tasks: {size: 5, rounds: 2}, memory: %s}"


def stream(memory: str, *overrides: str) -> Recipe:
    """Digits 0 to 4, then 5 to 9."""
    return trivial(
        DIGITS % memory, "federation={}", "checkpoints.keep=all", "train.optimiser=adamw", "train.lr=0.001", *overrides
    )


def read_state(ended: Ended, number: int) -> Mapping[str, Tensor]:
    record = ended.rounds[number].checkpoint
    assert record is not None
    return checkpoint.read_checkpoint(paths.get_runs_folder() / record.path, record.sha256)


def read_memory(ended: Ended, number: int) -> Mapping[str, Tensor]:
    record = ended.rounds[number].checkpoint
    assert record is not None
    assert record.memory_sha256 is not None
    path = checkpoint.get_memory_path(paths.get_runs_folder() / record.path)
    return checkpoint.read_checkpoint(path, record.memory_sha256)


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(tmp_path_factory.mktemp("naive")))
        return execute(stream("[]")).hashes


@pytest.mark.parametrize("memory", ["[{ewc: {strength: 0}}]", "[{lwf: {strength: 0}}]"])
def test_strength_zero_is_naive_to_the_bit(home: Path, naive: list[str], memory: str) -> None:
    assert execute(stream(memory)).hashes == naive


@pytest.mark.parametrize("memory", ["[ewc]", "[lwf]"])
def test_methods_act_from_the_second_task_on(home: Path, naive: list[str], memory: str) -> None:
    found = execute(stream(memory)).hashes
    assert found[:3] == naive[:3]
    assert found[3] != naive[3]


def test_huge_strength_holds_what_earlier_predictions_depend_on(home: Path) -> None:
    """Rows of new classes have no Fisher information, and may move."""
    ended = execute(stream("[{ewc: {strength: 1e9}}]", "train.lr=1e-5"))
    border, end, memory = read_state(ended, 2), read_state(ended, 4), read_memory(ended, 2)
    measured = memory["ewc/fisher/classifier.weight"] > 0
    assert measured.any()
    assert not measured[5:].any()
    moved = (end["classifier.weight"] - border["classifier.weight"]).abs()
    assert moved[measured].max() < 1e-4
    assert moved[5:].max() > 1e-4 / 5


def test_fisher_information_of_the_server_has_mean_one_and_anchors_the_border(home: Path) -> None:
    ended = execute(stream("[ewc]"))
    memory = read_memory(ended, 2)
    fisher = torch.cat([memory[f"ewc/fisher/classifier.{name}"].flatten() for name in ("weight", "bias")])
    assert fisher.mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(memory["ewc/anchor/classifier.weight"], read_state(ended, 2)["classifier.weight"])
    both = read_memory(ended, 4)
    total = torch.cat([both[f"ewc/fisher/classifier.{name}"].flatten() for name in ("weight", "bias")])
    assert total.mean().item() == pytest.approx(2, rel=1e-5)


def begin_lwf(model: torch.nn.Module, groups: list[int], strength: float) -> MethodRound:
    """A round whose teacher has another head; ``groups`` are those of its classes."""
    recipe = stream("[lwf]")
    received = {"teacher/head.weight": torch.ones(3, 5).tril(), "groups": torch.tensor(groups)}
    setup = MethodSetup(
        model,
        get_task(recipe.task),
        recipe,
        Place(1, 1, 1, 2, (0, 1)),
        0,
        Examples(),
        np.arange(3),
        lambda _: 0,
        received=received,
        num_labels=3,
    )
    return Lwf(strength=strength).begin_round(setup)


def test_lwf_distils_old_classes_that_the_loss_does_not_see() -> None:
    """With ``loss: new`` the model's own logits of old classes are -inf, but the term compares those below the mask."""
    model, batch = Linear().eval(), Examples().make_batch([0, 1, 2])
    begun = begin_lwf(model, [1, 1, 0], 3.0)
    plain = batch["pixel_values"] @ model.head.weight.T
    taught = batch["pixel_values"] @ torch.ones(3, 5).tril().T
    with mask_classes(model, [2], 3):
        logits = model(batch["pixel_values"]).logits
        assert logits[:, :2].isinf().all()
        term = begun.compute_batch_term([0, 1, 2], batch, logits)
    assert term is not None
    assert term.item() == pytest.approx(3 * compute_distillation_loss(plain, taught, 2.0, [0, 1]).item(), rel=1e-5)
    term.backward()
    assert model.head.weight.grad is not None
    assert model.head.weight.grad[:2].any(1).all()
    assert not model.head.weight.grad[2].any()


def test_classes_of_different_heads_are_distilled_apart() -> None:
    """A head with a single class has nothing to keep."""
    model, batch = Linear().eval(), Examples().make_batch([0, 1, 2])
    begun = begin_lwf(model, [1, 2, 2], 1.0)
    logits = model(batch["pixel_values"]).logits
    term = begun.compute_batch_term([0, 1, 2], batch, logits)
    taught = batch["pixel_values"] @ torch.ones(3, 5).tril().T
    assert term is not None
    assert term.item() == pytest.approx(compute_distillation_loss(logits, taught, 2.0, [1, 2]).item(), rel=1e-5)


def test_hook_on_the_head_ends_with_the_round() -> None:
    model = Linear()
    begun = begin_lwf(model, [1, 1, 0], 1.0)
    assert len(model.head._forward_hooks) == 1
    del begun
    assert not model.head._forward_hooks


def resume(whole: Ended, number: int) -> Ended:
    """Roll a run back to a round and let it end again."""
    with Store.open() as store:
        rollback_run(store, whole.run.id, number)
    crew = SequentialWorkers(app)
    with Store.open() as store, claim_run(whole.run.id), silent():
        clients = len({record.client for record in whole.rounds[1].client_records})
        run_to_completion(InProcessGrid(clients, crew), store, whole.run.id)
    return outcome(whole.run.id)


@pytest.mark.parametrize("memory", ["[{ewc: {fisher: sampled}}]", "[lwf]"])
def test_resumed_runs_have_the_same_bits(home: Path, memory: str) -> None:
    """Rolled back to the middle of the second task, and to the border."""
    whole = execute(stream(memory))
    for number in (3, 2):
        assert resume(whole, number).hashes == whole.hashes


def test_rows_of_words_train_beside_low_rank_pairs(home: Path, tmp_path: Path) -> None:
    """A text stream with a pair whose A is fixed: both methods together."""
    recipe = words(
        tmp_path,
        "stream={setting: domain, by: label, tasks: {size: 1, rounds: 1}, memory: [ewc, lwf]}",
        "federation={}",
        "train.techniques=[{lora: {trained_factors: b-only}}]",
    )
    ended = execute(recipe)
    assert ended.run.status == "completed"
    assert {name.split("/")[0] for name in read_memory(ended, 1)} == {"ewc", "lwf"}
    assert not any("lora_A" in name for name in read_memory(ended, 1) if name.startswith("ewc/"))


def refusal(*overrides: str, memory: str = "[ewc]") -> str:
    with pytest.raises(RecipeError) as caught:
        stream(memory, *overrides)
    return str(caught.value)


def test_moving_base_has_no_anchor(tmp_path: Path) -> None:
    for memory in ("ewc", "lwf"):
        with pytest.raises(RecipeError, match=f"{memory} holds trained tensors near those of the last border"):
            words(
                tmp_path,
                f"stream={{setting: domain, by: label, tasks: {{size: 1, rounds: 1}}, memory: [{memory}]}}",
                "federation={}",
                "train.techniques=[{lora: {trained_factors: both-and-base}}]",
                "merge=[flora]",
            )


def test_alternating_factors_are_refused_for_ewc(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set trained_factors: b-only"):
        words(
            tmp_path,
            "stream={setting: domain, by: label, tasks: {size: 1, rounds: 1}, memory: [ewc]}",
            "federation={}",
            "train.techniques=[lora]",
        )


def test_other_refusals() -> None:
    private = "privacy={clipping_norm: 1.0, noise_multiplier: 1.0, delta: 1e-5}"
    assert "privacy neither clips nor noises" in refusal(private)
    assert "all clients to end a task in the same round" in refusal("stream.arrival=own")
    assert "less than or equal to 1" in refusal(memory="[{ewc: {decay: 2}}]")
    alike = "devices=[{name: toy, count: 4, techniques: [bias]}]"
    assert "what lwf remembers fits one model" in refusal(alike, memory="[lwf]")
    private_lwf = stream("[lwf]", private)
    assert private_lwf.privacy is not None
    assert stream("[lwf]", "stream.arrival=own").stream is not None


def test_border_without_uploads_keeps_the_old_memory() -> None:
    """A failed round ends the task too: there is nothing new to know."""
    recipe = stream("[ewc]")
    memory = {"anchor/w": torch.ones(2), "fisher/w": torch.ones(2)}
    state = {"w": torch.zeros(2)}
    border = Border(recipe, torch.nn.Linear(1, 1), 1, 1, 4, state, state, state, memory, [])
    assert Ewc().after_task(border).memory == memory
    uploads = [TaskUpload(0, 1.0, {"w": torch.zeros(2), "count": torch.zeros(1)})]
    border = Border(recipe, torch.nn.Linear(1, 1), 1, 1, 4, state, state, state, memory, uploads)
    assert Ewc().after_task(border).memory == memory


def test_clients_that_begin_late_still_receive_the_memory(tmp_path: Path) -> None:
    """The first client's stream is over when those of the last wave train."""
    recipe = stream("[lwf]", "stream.arrival={staggered: 1, waves: 2}")
    plan = StreamPlan(recipe)
    context = SimpleNamespace(stream_plan=plan, recipe=recipe, methods=[Lwf()])
    last = plan.num_rounds
    assert plan.find_place(last, 0) is None
    found = list_sent_memory(context, {"lwf/groups": torch.ones(1)}, last)  # type: ignore[arg-type]
    assert set(found) == {"lwf/groups"}
    assert list_sent_memory(context, {"lwf/groups": torch.ones(1)}, last + 1) == {}  # type: ignore[arg-type]
