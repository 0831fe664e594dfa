"""Prepares, merges, profiles and simulates on the CPU and on the pretended card, for ``tests.card_rounds``."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from flwr.app import Context, Message
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import techniques
from fedtune.cli.merge import merge
from fedtune.device import local_round
from fedtune.device.client_app import app
from fedtune.profiling import profile_step
from fedtune.recipe.schema import Recipe
from fedtune.simulation.workers import SequentialWorkers
from fedtune.training import clear_run_context, named_tensors, prepare_model
from fedtune.wire import client_update
from tests.federations import Ended, execute, order_of, words
from tests.fusion_models import base_and_tuned, change_json, tensors
from tests.pretend_card import CARD, Card, use_card
from tests.profile_examples import a_case, a_recipe, tiny_bert
from tests.tiny import llama, texts

__all__ = ["PREPARED", "run_uses", "try_case"]

PREPARED: dict[str, Any] = {
    "meft+fused-cross-entropy": "meft+fused-cross-entropy",
    "lora+deft": "lora+deft",
    "dynamic-pruning": {"dynamic-pruning": {"density": 0.5, "update_every": 1}},
}
"""Techniques with a backward pass of their own, with a term in the loss, and with work between rounds."""

_CPU = torch.device("cpu")
_SCORED = ("validation", "test", "test-before", "local")
"""The splits of metrics that a model was scored for."""


def _build() -> nn.Module:
    """A model in double precision, where a rounding error stays small behind deft's steep gradient."""
    return llama().double()


def _prepare(units: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Two steps in a loop of one's own, then what was saved and merged."""
    prepared = fedtune.prepare(_build().to(device), PREPARED[units], task="text-generation")
    model, batch = prepared.model, {name: one.to(device) for name, one in texts(llama()).items()}
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1, momentum=0.9)
    prepared.attach(optimiser, steps_per_round=1, total_steps=2)
    memory = prepared.measure(batch)
    for step in range(2):
        torch.manual_seed(step)
        model.train()(**batch).loss.backward()
        optimiser.step()
        held = [*model.parameters(), *model.buffers(), *(one["momentum_buffer"] for one in optimiser.state.values())]
        optimiser.zero_grad()
    trained = {name: one.detach().cpu().clone() for name, one in model.named_parameters()}
    with torch.no_grad():
        logits = [model.eval()(**batch).logits.cpu()]
        loaded = AutoModelForCausalLM.from_pretrained(prepared.save(folder), trust_remote_code=True).eval()
        logits.append(loaded(**texts(llama())).logits)
        logits.append(prepared.merge()(**batch).logits.cpu())
    held += [*model.parameters(), *model.buffers()]
    strangers = sum(one.device != device for one in held)
    return {"memory": list(memory), "elsewhere": strangers, "trained": trained, "logits": logits}


def _compare_prepared(units: str, folder: Path) -> dict[str, Any]:
    wanted = _prepare(units, _CPU, folder / f"{units}-cpu")
    with use_card(pytest.MonkeyPatch()):
        found = _prepare(units, CARD, folder / f"{units}-card")
    return {
        "memory": [wanted["memory"], found["memory"]],
        "elsewhere": found["elsewhere"],
        "error": _gap(found["trained"], wanted["trained"]),
        "logits": _distance(found["logits"][0], wanted["logits"][0]),
        "learnt": _distance(found["logits"][0], _build().eval()(**texts(llama())).logits.detach()),
        "saved": _distance(found["logits"][0], found["logits"][1]),
        "merged": _distance(found["logits"][0], found["logits"][2]),
    }


def _merge_states() -> dict[str, Any]:
    """State dicts of the card give what those of the CPU give, on the CPU."""
    states = [llama(seed).state_dict() for seed in range(3)]
    wanted = fedtune.merge(states[1:], base=states[0], method="ties", density=0.4)
    with use_card(pytest.MonkeyPatch()):
        sent = [{name: one.to(CARD) for name, one in state.items()} for state in states]
        found = fedtune.merge(sent[1:], base=sent[0], method="ties", density=0.4)
    places = {one.device.type for one in found.values()}
    return {"places": sorted(places), "equal": all(torch.equal(found[name], one) for name, one in wanted.items())}


def _merge_folders(folder: Path) -> dict[str, Any]:
    """A merge whose steps run models to align, to relax and to renormalise, and whose models are scored."""
    base_and_tuned(folder, 2)
    rows = [" ".join(f"word{(row * 7 + k) % 39 + 1}" for k in range(30)) for row in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    wanted = _merge_by_command(folder, "cpu")
    with use_card(pytest.MonkeyPatch()) as card:
        found = _merge_by_command(folder, "auto")
        arrived = list(card.arrived)
    made = [tensors(folder / f"merged-{device}") for device in ("cpu", "auto")]
    return {
        "error": _gap(made[1], made[0]),
        "moved": _gap(made[0], tensors(folder / "base")),
        "scores": [wanted["scores"], found["scores"]],
        "models": sum(arrived) / sum(one.nbytes for one in made[0].values()),
    }


def _merge_by_command(folder: Path, device: str) -> Any:
    sources = [str(folder / name) for name in ("tuned1", "tuned2")]
    data = f"jsonl:{folder / 'texts.jsonl'}"
    steps = ("--align", "rebasin: {method: activation}", "--relax", "aim", "--renormalise", "rescale")
    watched = ("--calibration-data", data, "--eval-data", data, "--task", "text-generation", "--device", device)
    output = str(folder / f"merged-{device}")
    words = (*sources, "--base-model", str(folder / "base"), "--method", "ties", *steps, *watched)
    done = CliRunner().invoke(merge, [*words, "-o", output, "--json", "--no-report"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def _compare_profiles(folder: Path) -> dict[str, Any]:
    recipe = a_recipe(tiny_bert(folder))
    wanted = profile_step(a_case(recipe, "bias", check=True))
    with use_card(pytest.MonkeyPatch()):
        found = profile_step(a_case(_on_card(recipe), "bias", check=True))
    return {"wanted": asdict(wanted), "found": asdict(found)}


def _on_card(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": "auto"})})


def _simulate(folder: Path) -> dict[str, Any]:
    """Two rounds of three clients, all of which score the result: on the CPU, then on the card."""
    os.environ["FEDTUNE_HOME"] = str(folder / "home")
    more = ("evaluation.local_holdout=0.3", "evaluation.clients=1", "federation.rounds=1")
    recipe = words(folder, *more)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # a device draws dropout by itself
    change_json(folder / "bert" / "config.json", quiet)
    wanted = execute(recipe, run="cpu")
    clear_run_context()
    patched = pytest.MonkeyPatch()
    with use_card(patched) as card, patched.context() as types:
        for module in (client_update, local_round):
            types.setattr(module, "DEVICE_TYPES", ("cpu", "card", "mps"))
        turns: list[tuple[tuple[int, int], list[int]]] = []
        found = execute(_on_card(recipe), SequentialWorkers(_count_arrivals(card, turns)), run="card")
        arrived = list(card.arrived)
    clear_run_context()
    return {
        "metrics": [_list_metrics(wanted), _list_metrics(found)],
        "devices": [_list_devices(wanted), _list_devices(found)],
        "turns": [[list(order), sizes] for order, sizes in turns],
        "arrived": arrived,
        **_list_bytes(recipe),
    }


def _list_bytes(recipe: Recipe) -> dict[str, list[int]]:
    """The bytes of each tensor of the model, of those that are shared, and of those that round 1 trains."""
    model, chosen, shared = prepare_model(recipe, ("bad", "good"))
    techniques.begin_round(chosen, model, 1)
    sizes = {name: one.nbytes for name, one in named_tensors(model).items()}
    trained = techniques.list_trainable_tensors(model)
    return {
        "model": [*sizes.values()],
        "shared": [sizes[name] for name in shared],
        "trained": [sizes[name] for name in trained],
    }


def _count_arrivals(card: Card, turns: list[tuple[tuple[int, int], list[int]]]) -> Any:
    """The client app, which notes what each turn of a client sends to the card."""

    def run(message: Message, context: Context) -> Message:
        before = len(card.arrived)
        reply = app(message, context)
        turns.append((order_of(message), card.arrived[before:]))
        return reply

    return run


def _list_metrics(ended: Ended) -> list[Any]:
    scored = [
        [done.number, one.split, one.domain, one.name, one.value] for done in ended.rounds for one in done.metrics
    ]
    own = [
        [done.number, one.client, one.moment, one.name, one.value]
        for done in ended.rounds
        for one in done.client_scores
    ]
    return scored + own


def _list_devices(ended: Ended) -> list[str | None]:
    own = [one.device_type for done in ended.rounds for one in done.client_records]
    own += [one.device_type for done in ended.rounds for one in done.client_scores]
    scored = [one for done in ended.rounds for one in done.metrics if one.split in _SCORED]
    return [*(done.device_type for done in ended.rounds), *own, *(one.device_type for one in scored)]


def _gap(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(_distance(found[name], one) for name, one in wanted.items())


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def try_case(case: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a case found, or how it failed."""
    try:
        return case(*arguments)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def run_uses() -> dict[str, Any]:
    """What each use found on the CPU and on the card."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        return {
            "prepared": {units: try_case(_compare_prepared, units, folder) for units in PREPARED},
            "merged states": try_case(_merge_states),
            "merged folders": try_case(_merge_folders, folder),
            "profiled": try_case(_compare_profiles, folder / "profiled"),
            "simulated": try_case(_simulate, folder),
        }
