"""Masks that move: the server's choice against a slow twin, extrusion against its equations, whole federations."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import checkpoint, techniques
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.errors import ModelError, RecipeError
from fedtune.export import export_model
from fedtune.recipe.schema import Unit
from fedtune.server.events import Event, RoundStarted, event_handler
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tasks import get_task
from fedtune.techniques import ExtraPayload, StepInfo, Technique
from fedtune.techniques.pruning._layer_density import count_active_weights
from fedtune.techniques.pruning._mask_updates import update_mask
from fedtune.techniques.pruning._packed_positions import scatter_positions
from fedtune.tracking import Store, claim_run
from fedtune.training import ClientRound, compute_step_loss, get_model_state, train_local_model
from fedtune.wire.masked_weights import encode_masked_state, find_masks, select_active_values
from tests.federations import Ended, begin, execute, outcome, silent, spoilt, trivial
from tests.technique_steps import TEXT
from tests.test_rounds import with_deltas
from tests.tiny import a_training_recipe, bert, few_texts

SETTINGS = "train.techniques=[{name: dynamic-pruning, settings: {density: 0.2, every: 1, until: 10, share: 0.5}}]"


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 10)
        )


def applied(model: nn.Module, **settings: Any) -> tuple[tuple[Technique, ...], list[str]]:
    chosen = techniques.build_techniques(
        [Unit(name="dynamic-pruning", settings={"density": 0.2, "every": 2, **settings})]
    )
    return chosen, techniques.apply_techniques(chosen, model, get_task("image-classification"), 0)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.cross_entropy(model(torch.randn(6, 3, 8, 8, generator=random)), torch.arange(6))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 0.97])
def test_layer_densities_make_the_budget_and_follow_the_kernel_rule(density: float) -> None:
    shapes = {"thin": (4, 3, 3, 3), "wide": (128, 64, 3, 3), "flat": (10, 200)}
    total, dense = sum(math.prod(shape) for shape in shapes.values()), 300
    counts = count_active_weights(shapes, dense, density)
    assert sum(counts.values()) + dense == pytest.approx(density * (total + dense), abs=len(shapes))
    open_ones = {name: count for name, count in counts.items() if count < math.prod(shapes[name])}
    factors = [count / sum(shapes[name]) for name, count in open_ones.items()]
    assert max(factors) / min(factors) == pytest.approx(1, rel=0.05)
    assert all(counts[name] == math.prod(shapes[name]) for name in shapes.keys() - open_ones.keys())


def test_a_density_below_what_no_mask_covers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(100, 4))
    with pytest.raises(ModelError, match=r"density 0.2 is below the 0.9\d\d of the model that no mask covers"):
        applied(model)


@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_the_start_has_the_density_and_its_weights_are_zero_elsewhere(start: str) -> None:
    model, again, dense = net(), net(), net()
    _, shared = applied(model, start=start)
    applied(again, start=start)
    state = get_model_state(model, shared)
    active = sum(int((tensor != 0).sum()) for name, tensor in state.items() if not name.endswith("mask"))
    assert active == pytest.approx(0.2 * sum(p.numel() for p in model.parameters()), abs=3)
    for name, mask in find_masks(state).items():
        before = dense.get_parameter(name)
        assert mask.dtype == torch.uint8
        assert torch.equal(state[name], before * mask)
        assert torch.equal(again.get_parameter(name), state[name])
        if start == "magnitude":
            assert before[mask == 1].abs().min() >= before[mask == 0].abs().max()


def test_masked_gradients_and_moments_leave_zeros_zero() -> None:
    model = net()
    chosen, shared = applied(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        loss_of(model, step).backward()
        assert techniques.before_optimiser_step(chosen, model, StepInfo(1, step, 5, 0.1, 0.1)) == 0.1
        optimiser.step()
        optimiser.zero_grad()
    state = get_model_state(model, shared)
    for name, mask in find_masks(state).items():
        assert torch.equal(state[name] == 0, mask == 0)


def slow_move(weight: Tensor, mask: Tensor, gradient: Tensor, count: int) -> Tensor:
    """One entry after the other, as one would explain it."""
    flat, after = list(range(mask.numel())), mask.flatten().tolist()
    w, g, m = weight.flatten().tolist(), gradient.flatten().tolist(), mask.flatten().tolist()
    for place in sorted((i for i in flat if m[i]), key=lambda i: abs(w[i]))[:count]:
        after[place] = 0
    for place in sorted((i for i in flat if not m[i]), key=lambda i: -abs(g[i]))[:count]:
        after[place] = 1
    return torch.tensor(after, dtype=torch.uint8).reshape(mask.shape)


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_a_mask_moves_as_its_slow_twin_ties_included(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    mask = (torch.rand(5, 8, generator=random) < 0.4).to(torch.uint8)
    weight = (torch.randn(5, 8, generator=random) * 2).round() * mask
    gradient = (torch.randn(5, 8, generator=random) * 2).round()
    assert torch.equal(update_mask(weight, mask, gradient, count), slow_move(weight, mask, gradient, count))


def answers(model: nn.Module, chosen: tuple[Technique, ...], number: int, weights: list[float]) -> list[ExtraPayload]:
    def backward(seed: int) -> Callable[[], None]:
        return lambda: loss_of(model, seed).backward()

    return [
        ExtraPayload(weight, techniques.compute_extra_payload(chosen, model, number, backward(seed)))
        for seed, weight in enumerate(weights)
    ]


def test_density_holds_over_fifty_moves_and_what_wakes_starts_at_zero() -> None:
    model = net()
    chosen, shared = applied(model, every=1, until=60, share=0.6)
    state = get_model_state(model, shared)
    counts = {name: int(mask.sum()) for name, mask in find_masks(state).items()}
    woken = 0
    for number in range(1, 51):
        after = techniques.after_aggregation(chosen, state, number, answers(model, chosen, number, [1.0]))
        for name, mask in find_masks(after).items():
            assert int(mask.sum()) == counts[name]
            fresh = (mask == 1) & (find_masks(state)[name] == 0)
            woken += int(fresh.sum())
            assert not after[name][fresh].any()
            assert not after[name][mask == 0].any()
            after[name] = after[name] + torch.randn(mask.shape) * 0.1 * mask
        state = after
        for name, tensor in state.items():
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.copy_(tensor)
    assert woken > 500


def test_top_gradients_lead_to_the_same_mask_as_dense_ones_when_they_cover_all_that_is_inactive() -> None:
    model = net()
    chosen, shared = applied(model, density=0.9, every=1, until=1000, share=1.0)
    state = get_model_state(model, shared)
    sent = answers(model, chosen, 1, [0.25, 0.75])
    revised = techniques.after_aggregation(chosen, state, 1, sent)
    dense: dict[str, Tensor] = {}
    for seed, weight in enumerate([0.25, 0.75]):
        model.zero_grad()
        loss_of(model, seed).backward()
        for name in find_masks(state):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            sent_as = gradient.bfloat16().double()
            dense[name] = dense.get(name, torch.zeros(gradient.shape).double()) + weight * sent_as
    for name, mask in find_masks(state).items():
        inactive = int((mask == 0).sum())
        assert sent[0].tensors.get(f"{name.removesuffix('.weight')}.wake_gradient", torch.empty(0)).numel() == inactive
        assert torch.equal(revised[name.replace("weight", "mask")], slow_move(state[name], mask, dense[name], inactive))


def test_a_client_sends_its_largest_inactive_gradients_and_keeps_none() -> None:
    model = net()
    chosen, _ = applied(model)
    [found] = answers(model, chosen, 2, [1.0])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: tuple(form.shape) for name, form in techniques.declare_extra_payload(chosen, model, 2).items()} == {
        name: tuple(tensor.shape) for name, tensor in found.tensors.items()
    }
    loss_of(model).backward()
    layer = model[2]
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight.grad is not None
    inactive = layer.weight.grad[layer.get_buffer("mask") == 0].abs().sort(descending=True).values
    count = found.tensors["2.wake_gradient"].numel()
    assert count > 0
    told = found.tensors["2.wake_gradient"]
    assert torch.equal(told.abs().sort(descending=True).values, inactive[:count].bfloat16())
    spread_out = scatter_positions("2.wake", found.tensors, told, layer.weight.numel())
    largest = layer.weight.grad.masked_fill(layer.get_buffer("mask") == 1, 0).flatten()
    assert torch.equal(spread_out, torch.where(largest.abs() >= inactive[count - 1], largest.bfloat16().double(), 0.0))


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_answer_of_a_round_keeps_to_the_micro_batch(micro: int | None) -> None:
    """A device that cannot hold a whole batch cannot hold it for its answer either; the gradients add up."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    chosen, shared = applied(model, density=0.6, every=1)
    seen: list[int] = []
    layer = "bert.encoder.layer.0.intermediate.dense"
    model.register_forward_hook(lambda _, __, out: seen.append(len(out.logits)))
    recipe = a_training_recipe(batch_size=8, local_steps=1, optimiser="sgd")
    state = get_model_state(model, shared)
    extras = train_local_model(
        ClientRound(model, chosen, recipe, few_texts(), np.arange(12), 1, 0, micro_batch_size=micro), state
    ).extra_payload
    assert max(seen) == (micro or 8)
    model.zero_grad()
    model.eval()
    compute_step_loss(TEXT, model, few_texts().make_batch(range(8))).backward()
    gradient = model.get_parameter(f"{layer}.weight").grad
    assert gradient is not None
    inactive = gradient[model.get_buffer(f"{layer}.mask") == 0]
    told = extras[f"{layer}.wake_gradient"].float()
    assert told.numel() > 0
    largest = inactive.abs().topk(told.numel()).values.sort().values
    torch.testing.assert_close(told.abs().sort().values, largest, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("number", "moves"), [(1, False), (2, True), (3, False), (4, True), (6, False)])
def test_only_rounds_that_move_the_mask_ask_for_gradients(number: int, moves: bool) -> None:
    model = net()
    chosen, shared = applied(model, until=5)
    state = get_model_state(model, shared)
    assert bool(techniques.declare_extra_payload(chosen, model, number)) == moves
    [found] = answers(model, chosen, number, [1.0])
    assert bool(found.tensors) == moves
    after = techniques.after_aggregation(chosen, state, number, [found])
    assert all(torch.equal(after[name], state[name]) for name in state) != moves


def test_a_fixed_mask_never_moves() -> None:
    model = net()
    chosen, _ = applied(model, every=None)
    assert not any(techniques.declare_extra_payload(chosen, model, number) for number in range(1, 100))


def marked_norm(model: nn.Module) -> float:
    squares = [
        float((layer.get_parameter("weight").detach()[vars(layer)["marked"]].double() ** 2).sum())
        for layer in model.modules()
        if "marked" in vars(layer)
    ]
    return math.sqrt(sum(squares))


def test_extrusion_adds_its_gradient_and_raises_the_rate_by_the_equations() -> None:
    model = net()
    chosen, _ = applied(model, extrusion={"strength": 0.3})
    for step in range(8):
        model.zero_grad()
        loss_of(model, step).backward()
        layer = model[0]
        assert isinstance(layer, nn.Conv2d)
        assert layer.weight.grad is not None
        plain, theta = layer.weight.grad.clone(), layer.weight.detach().clone()
        mask = layer.get_buffer("mask")
        lr = techniques.before_optimiser_step(chosen, model, StepInfo(2, step, 8, 0.1, 0.001))
        marked = vars(layer)["marked"]
        count = techniques.declare_extra_payload(chosen, model, 2)["0.wake_gradient"].shape[0]
        assert int(marked.sum()) == count
        assert bool((mask[marked] == 1).all())
        torch.testing.assert_close(layer.weight.grad, plain * mask + 0.6 * theta * marked)
        p = (16 - 2 * step) / (16 - step)
        wanted = p * (2 * torch.sigmoid(torch.tensor(marked_norm(model))).item() - 1) * 0.1
        assert lr == pytest.approx(max(wanted, 0.001))
    assert techniques.before_optimiser_step(chosen, model, StepInfo(3, 0, 8, 0.1, 0.001)) == 0.001


def test_with_a_constant_task_loss_the_marked_weights_shrink_and_the_others_stay() -> None:
    model = net()
    chosen, _ = applied(model, extrusion={"strength": 0.5})
    before = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    norms = []
    for step in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        lr = techniques.before_optimiser_step(chosen, model, StepInfo(2, step, 20, 0.5, 0.01))
        norms.append(marked_norm(model))
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=lr)
    assert all(later < earlier for earlier, later in pairwise(norms))
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.detach()[~vars(layer)["marked"]], weight[~vars(layer)["marked"]])


def test_a_smaller_drop_costs_less_after_extrusion() -> None:
    """The mean change of the output by the drop, over the same steps with and without."""
    costs = {}
    for extrusion in (None, {"strength": 0.5}):
        model = net()
        chosen, shared = applied(model, extrusion=extrusion, share=1.0)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(40):
            optimiser.zero_grad()
            loss_of(model).backward()
            optimiser.param_groups[0]["lr"] = techniques.before_optimiser_step(
                chosen, model, StepInfo(2, step, 40, 0.2, 0.05)
            )
            optimiser.step()
        state = get_model_state(model, shared)
        before = loss_of(model).item()
        after = techniques.after_aggregation(chosen, state, 2, answers(model, chosen, 2, [1.0]))
        for name in find_masks(state):
            model.get_parameter(name).data.copy_(after[name])
        costs[extrusion is None] = loss_of(model).item() - before
    assert costs[False] < 0.5 * costs[True]


def feddst() -> dict[str, Any]:
    return {"by": "clients", "extrusion": None, "share": 0.6, "every": 1}


def test_each_client_moves_its_mask_midway_and_the_server_averages_over_holders() -> None:
    """Against dense arithmetic: every client's whole weights and masks in hand."""
    model = net()
    chosen, shared = applied(model, **feddst())
    state = get_model_state(model, shared)
    found = find_masks(state)
    finished, sent = [], []
    for seed, weight in enumerate([0.2, 0.3, 0.5]):
        for name, tensor in state.items():
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.copy_(tensor)
        for step in range(4):
            model.zero_grad()
            loss_of(model, 10 * seed + step).backward()
            techniques.before_optimiser_step(chosen, model, StepInfo(1, step, 4, 0.1, 0.1))
            moved_yet = any(not torch.equal(model.get_buffer(n.replace("weight", "mask")), found[n]) for n in found)
            assert moved_yet == (step >= 2)
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=0.1)
        finished.append(get_model_state(model, shared))
        sent.append(ExtraPayload(weight, techniques.compute_extra_payload(chosen, model, 1, lambda: None)))
    weights = torch.tensor([answer.weight for answer in sent])
    merged = {name: torch.tensordot(weights, torch.stack([one[name] for one in finished]), 1) for name in found}
    at_old = {name: tensor * found[name] for name, tensor in merged.items()}
    revised = techniques.after_aggregation(chosen, {**state, **at_old}, 1, sent)
    for name, mask in found.items():
        own = torch.stack([one[name.replace("weight", "mask")].float() for one in finished])
        held = torch.tensordot(weights, own, 1)
        mean = torch.where(held > 0, merged[name] / held, 0.0)
        kept = revised[name.replace("weight", "mask")]
        assert int(kept.sum()) == int(mask.sum())
        assert mean[kept == 1].abs().min() >= mean[(kept == 0) & (held > 0)].abs().max() - 1e-6
        torch.testing.assert_close(revised[name], mean * kept, rtol=1e-5, atol=1e-7)


def test_a_federation_whose_clients_move_their_own_masks_runs_and_holds_its_density(home: Path) -> None:
    ended = execute(trivial(SETTINGS.replace("share: 0.5", "share: 0.5, by: clients, extrusion: null")))
    assert [record.status for record in ended.rounds] == ["completed"] * 3
    first, last = (weights_at(ended, number)["classifier.mask"] for number in (0, 2))
    assert int(first.sum()) == int(last.sum())
    assert not torch.equal(first, last)
    assert {sent.status for record in ended.rounds for sent in record.client_records} == {"merged"}


def test_extrusion_makes_no_sense_where_clients_move_masks() -> None:
    with pytest.raises(RecipeError, match="set extrusion: null when updated_by is clients"):
        applied(net(), by="clients")


def weights_at(ended: Ended, number: int) -> dict[str, Tensor]:
    record = ended.rounds[number].checkpoint
    assert record is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / record.path, record.sha256)


def test_a_federation_moves_its_mask_and_sends_what_the_formula_says(home: Path) -> None:
    ended = execute(trivial(SETTINGS, "federation.rounds=3", "checkpoints.keep=all"))
    assert ended.run.status == "completed"
    before, after = weights_at(ended, 0), weights_at(ended, 1)
    mask = before["classifier.mask"]
    active = int(mask.sum())
    change = math.floor(0.25 * (1 + math.cos(math.pi / 10)) * active)
    assert int((mask & ~after["classifier.mask"] & 1).sum()) == change
    for contribution in ended.rounds[1].client_records:
        values = 4 * (active + 10) + 3 * change + math.ceil(mask.numel() / 255)
        assert values < contribution.bytes_up <= values + 400
        down = 4 * (active + 10) + encode_masked_state(before)["classifier.mask"].numel()
        assert down < contribution.bytes_down <= down + 300
    woken = select_active_values(after, find_masks(after))["classifier.weight"] == 0
    assert int(woken.sum()) >= change


def test_an_interrupted_federation_ends_with_the_bits_of_one_left_alone(home: Path) -> None:
    whole = execute(trivial(SETTINGS, "federation.rounds=4"), run="whole")

    def stop(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.number == 3:
            raise KeyboardInterrupt

    recipe = trivial(SETTINGS, "federation.rounds=4")
    with Store.open() as store, claim_run(begin(store, recipe, "broken")):
        token = event_handler.set(stop)
        with pytest.raises(KeyboardInterrupt):
            run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, "broken")
        event_handler.reset(token)
        with silent():
            run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, "broken")
    assert outcome("broken").hashes == whole.hashes


def test_one_client_at_full_density_is_plain_training_bit_for_bit(home: Path) -> None:
    one = ("devices=[{count: 1}]", "federation.rounds=2")
    masked = "train.techniques=[{name: dynamic-pruning, settings: {density: 1.0, every: 1}}]"
    plain, dense = execute(trivial(*one), run="plain"), execute(trivial(*one, masked), run="dense")
    wanted, found = weights_at(plain, 2), weights_at(dense, 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_place_beyond_its_block_is_refused_and_the_round_goes_on(home: Path) -> None:
    def beyond(sent: dict[str, Tensor]) -> dict[str, Tensor]:
        sent["classifier.wake_offset"][0] = 255
        return sent

    ended = execute(trivial(SETTINGS), spoilt(with_deltas(beyond), {1}))
    [bad] = [found for found in ended.rounds[1].client_records if found.client == 1]
    assert bad.status == "rejected"
    assert "outside 0 to 254" in bad.reason
    assert np.isfinite([metric.value for metric in ended.rounds[-1].metrics]).all()


def test_an_exported_model_has_zeros_and_no_masks(home: Path, tmp_path: Path) -> None:
    recipe = trivial(SETTINGS)
    ended = execute(recipe)
    state = weights_at(ended, 2)
    export_model(recipe, state, tmp_path / "out", None, "card")
    saved = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith("mask") for name in saved)
    [weight] = [tensor for name, tensor in saved.items() if name.endswith("classifier.weight")]
    assert torch.equal(weight, state["classifier.weight"])
