"""Techniques with a low-rank pair for each task: what is trained when, O-LoRA's term, and InfLoRA in whole runs."""

from pathlib import Path

import pytest
import torch

from fedtune import techniques
from fedtune.continual import Border, TaskUpload
from fedtune.continual._layer_grams import group_layers_by_input, measure_grams, pack_triangle, unpack_triangle
from fedtune.continual.dual_gpm import DualGpm
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.techniques import StepInfo, begin_round, list_trainable_tensors
from fedtune.techniques.low_rank.inf_lora import InfLora
from fedtune.techniques.low_rank.o_lora import OLora
from fedtune.training import get_model_state
from tests.federations import execute, words
from tests.technique_steps import TEXT, chosen, logits, shake
from tests.test_anchor_methods import read_memory, read_state, resume
from tests.tiny import bert, texts

VISITS = [(0, 2), (1, 3), (0, 1)]
QUERY = "bert.encoder.layer.0.attention.self.query"


def test_one_factor_of_the_present_task_is_trained() -> None:
    model = bert()
    picked = chosen("o-lora", visits=VISITS)
    names = techniques.apply_techniques(picked, model, TEXT, 0)
    seen: list[str] = []
    for number in range(1, 8):
        begin_round(picked, model, number)
        now = {
            name.split(".lora_")[1].removesuffix(".weight") for name in list_trainable_tensors(model) if "lora" in name
        }
        assert len(now) == 1
        seen += now
        assert "classifier.weight" in list_trainable_tensors(model)
    assert seen == ["B.task1", "A.task1", "B.task2", "A.task2", "B.task2", "B.task1", "A.task1"]
    assert {f"{QUERY}.lora_{factor}.task{task}.weight" for factor in "AB" for task in (1, 2)} <= set(names)


def test_model_starts_as_the_base_and_ends_as_the_sum_of_all_pairs() -> None:
    model, plain = bert(), bert()
    batch, weight = texts(model), plain.get_parameter(f"{QUERY}.weight").detach().clone()
    [technique] = chosen("o-lora", visits=VISITS)
    before = logits(model, batch)
    names = techniques.apply_techniques([technique], model, TEXT, 0)
    assert torch.equal(logits(model, batch), before)
    shake(model, [name for name in names if "lora" in name])
    a, b = ([model.get_parameter(f"{QUERY}.lora_{f}.task{t}.weight") for t in (1, 2)] for f in "AB")
    products = sum((one @ other for one, other in zip(b, a, strict=True)), torch.zeros_like(weight))
    wanted, there = logits(model, batch), weight + 2.0 * products
    technique.merge_into_weights(model)
    torch.testing.assert_close(model.get_parameter(f"{QUERY}.weight"), there)
    torch.testing.assert_close(logits(model, batch), wanted, rtol=0, atol=1e-5)


def test_overlap_pushes_rows_of_a_apart_in_rounds_that_train_a() -> None:
    model = bert()
    [technique] = chosen("o-lora", visits=VISITS, overlap=0.25)
    techniques.apply_techniques([technique], model, TEXT, 0)
    one, two = (model.get_parameter(f"{QUERY}.lora_A.task{task}.weight") for task in (1, 2))
    for number in (1, 2, 3):
        begin_round([technique], model, number)
        assert technique.before_optimiser_step(model, StepInfo(number, 0, 1, 0.1, 0.1)) == 0.1
        assert one.grad is None
        assert two.grad is None
    begin_round([technique], model, 4)
    two.grad = torch.ones_like(two)
    technique.before_optimiser_step(model, StepInfo(4, 0, 1, 0.1, 0.1))
    assert one.grad is None
    torch.testing.assert_close(two.grad, 1 + 0.25 * (one @ two.T).sign().T @ one)


def test_half_of_the_rows_wait_for_their_design() -> None:
    for visits, rows in (([(0, 2), (1, 2)], 3), ([(0, 1), (1, 1)], 5), ([], 5)):
        model = bert()
        [technique] = chosen("inf-lora", visits=visits, rank=5)
        techniques.apply_techniques([technique], model, TEXT, 0)
        a = model.get_parameter("bert.encoder.layer.0.attention.self.key.lora_A.task1.weight")
        assert a[:rows].any(1).all()
        assert not a[rows:].any()
        begin_round([technique], model, 2)
        assert not [name for name in list_trainable_tensors(model) if "lora_A" in name]


def test_grams_leave_out_padding_and_are_shared_by_layers_with_one_input() -> None:
    model = bert()
    picked = chosen("inf-lora", visits=[(0, 2)])
    techniques.apply_techniques(picked, model, TEXT, 0)
    key = "bert.encoder.layer.0.attention.self.key"
    assert group_layers_by_input(model)[key] == (key, key.replace("key", "value"))
    batch = texts(model)
    entered = []
    handle = model.get_submodule(key).register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    logits(model, batch)
    handle.remove()
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(entered[0].shape[:2]).bool()
    rows = entered[0][real].double()
    gram = measure_grams(model, picked, [key], [batch])[key]
    torch.testing.assert_close(gram, rows.T @ rows)
    torch.testing.assert_close(unpack_triangle(pack_triangle(gram), len(gram)), gram, rtol=1e-6, atol=1e-6)


def stream(folder: Path, technique: str, memory: str = "[]", rounds: int = 2, *overrides: str) -> Recipe:
    return words(
        folder,
        f"stream={{setting: domain, by: label, tasks: {{size: 1, rounds: {rounds}}}, memory: {memory}}}",
        "federation={}",
        "checkpoints.keep=all",
        f"train.techniques=[{technique}]",
        *overrides,
    )


def test_o_lora_holds_pairs_of_other_tasks(home: Path, tmp_path: Path) -> None:
    ended = execute(stream(tmp_path, "o-lora"))
    start, border, middle, end = (read_state(ended, number) for number in (0, 2, 3, 4))
    pairs = [name for name in start if "lora_" in name]
    assert all(torch.equal(start[name], border[name]) == ("task2" in name) for name in pairs)
    assert all(torch.equal(border[name], end[name]) for name in pairs if "task1" in name)
    assert all(torch.equal(middle[name], end[name]) for name in pairs if "lora_B.task2" in name)
    assert ended.run.status == "completed"


def test_inf_lora_designs_a_off_earlier_inputs_and_trains_b_alone(home: Path, tmp_path: Path) -> None:
    ended = execute(stream(tmp_path, "inf-lora", "[{dual-gpm: {first_share: 0.8}}]", 3))
    states = [read_state(ended, number) for number in range(7)]
    memory = read_memory(ended, 3)
    assert memory
    for name, subspace in memory.items():
        layer = name.removeprefix("dual-gpm/")
        for factor in (f"{layer}.lora_A.task2.weight", f"{layer.replace('key', 'value')}.lora_A.task2.weight"):
            a = states[6][factor]
            assert (a @ subspace).abs().max() < 1e-5
            assert a.any(1).sum() == 8
            assert torch.equal(states[4][factor], a)
            assert torch.equal(states[3][factor][:4], a[:4])
            assert not states[3][factor][4:].any()
            torch.testing.assert_close(3 * a @ a.T, torch.eye(8), atol=1e-5, rtol=0)
        first = f"{layer}.lora_A.task1.weight"
        assert torch.equal(states[1][first], states[6][first])
        assert not states[0][first][4:].any()
    assert any(not torch.equal(states[5][name], states[6][name]) for name in states[0] if "lora_B.task2" in name)


@pytest.mark.parametrize(("technique", "memory"), [("o-lora", "[]"), ("inf-lora", "[dual-gpm]")])
def test_resumed_runs_have_the_same_bits(home: Path, tmp_path: Path, technique: str, memory: str) -> None:
    """Rolled back to the middle of the second task, and to the border."""
    whole = execute(stream(tmp_path, technique, memory))
    for number in (3, 2):
        assert resume(whole, number).hashes == whole.hashes


def test_pair_of_a_task_that_comes_again_is_not_designed_anew(tmp_path: Path) -> None:
    recipe, visits = stream(tmp_path, "inf-lora", "[dual-gpm]"), [(0, 2), (1, 2), (0, 2)]
    units = [Unit(name="inf-lora", settings={"visits": visits})]
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})
    model = bert()
    names = techniques.apply_techniques(chosen("inf-lora", visits=visits), model, TEXT, 0)
    state, method = get_model_state(model, names), DualGpm()
    uploads = [
        TaskUpload(
            0, 1.0, {name: torch.ones(form.shape) for name, form in method.declare_upload(model, recipe, []).items()}
        )
    ]
    for visit, task in enumerate((0, 1, 0)):
        border = Border(recipe, model, visit, task, 2 * visit + 1, state, state, state, {}, uploads)
        designed = method.after_first_round(border)
        changed = {name for name in state if not torch.equal(state[name], designed[name])}
        assert bool(changed) == (visit < 2)
        assert all(f"lora_A.task{task + 1}" in name for name in changed)
    failed = Border(recipe, model, 0, 0, 1, state, state, state, {}, [])
    assert method.after_first_round(failed) == state
    drawn = method.after_task(failed)
    assert drawn.memory == {}
    assert {name for name in state if not torch.equal(state[name], drawn.state[name])} == {
        name for name in state if "lora_A.task2" in name
    }


def test_refusals(tmp_path: Path) -> None:
    def refuse(*given: object) -> str:
        with pytest.raises(RecipeError) as caught:
            stream(tmp_path, *given)  # type: ignore[arg-type]
        return str(caught.value)

    assert "inf-lora needs what dual-gpm remembers" in refuse("inf-lora")
    assert "add it to train.techniques" in refuse("lora", "[dual-gpm]")
    assert "set stream.arrival: together" in refuse("o-lora", "[]", 2, "stream.arrival=own")
    assert "both add a low-rank pair" in refuse("o-lora, lora")
    assert "o-lora trains others in other rounds" in refuse("o-lora", "[ewc]")
    private = "privacy={clipping_norm: 1.0, noise_multiplier: 1.0, delta: 1e-5}"
    assert "privacy neither clips nor noises" in refuse("inf-lora", "[dual-gpm]", 2, private)


def test_techniques_follow_a_stream_and_do_without_one() -> None:
    assert OLora().list_pair_names() == ["task1"]
    assert OLora().find_visit(5).round == 5
    assert InfLora().count_random_rows(0) == 8
    followed = OLora().follow_stream([(0, 2), (1, 1)], together=True)
    assert followed.list_pair_names() == ["task1", "task2"]
