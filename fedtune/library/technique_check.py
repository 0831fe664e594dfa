"""Check a technique on tiny models: it trains, repeats, travels and merges into plain layers."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.library.prepared_model import PreparedModel, prepare
from fedtune.library.tiny_models import TINY_MODELS, TinyModel
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, import_unit_class
from fedtune.techniques import Technique
from fedtune.training import get_model_state, set_model_state
from fedtune.wire.client_update import decode_tensors, pack

__all__ = ["check_technique"]

_STEPS, _LR = 3, 0.1
_TOLERANCE = 1e-3


def check_technique(name: str) -> Iterator[CheckResult]:
    """Check a technique on each tiny model that it fits; it must fit at least one."""
    if _quantises(name):
        yield CheckResult("skipped", "on tiny models", "it needs a model in four bits")
        return
    if getattr(import_unit_class("fedtune.techniques", name, "techniques"), "estimates_gradients", False):
        yield CheckResult("skipped", "on tiny models", "it takes the steps of a round itself, without a backward pass")
        return
    fits = False
    for tiny in TINY_MODELS:
        try:
            _prepare(name, tiny)
        except (ModelError, RecipeError) as error:
            yield CheckResult("skipped", f"on {tiny.name}", str(error))
            continue
        except Exception as error:
            yield CheckResult("failed", f"on {tiny.name}", " ".join(f"{type(error).__name__}: {error}".split()))
            continue
        fits = True
        checks = {
            "gradients reach what is trained, and nothing else": _check_gradients,
            "the same seed gives the same bits": _check_repeat,
            "its state travels and gives the same outputs": _check_travel,
            "it merges into plain layers with the same outputs": _check_merge,
        }
        for what, check in checks.items():
            refusal = ModelError if check is _check_merge else ()  # some have no plain layers to merge into
            yield run_check(f"on {tiny.name}: {what}", partial(check, name, tiny), refusal)
    yield run_check("it fits a tiny model", lambda: require(fits, "it fits none; see the reasons above"))


def _quantises(name: str) -> bool:
    unit: Technique = build_unit("fedtune.techniques", Unit(name=name), "techniques")
    return unit.make_quantisation_config() is not None


def _prepare(name: str, tiny: TinyModel, global_seed: int = 0) -> PreparedModel:
    """A tiny model under the technique, and under one that trains something if this one does not.

    ``global_seed`` is that of torch, on which no technique may depend.
    """
    trains = getattr(import_unit_class("fedtune.techniques", name, "techniques"), "selects_trainable_tensors", True)
    units = [name] if trains else [_find_partner(name), name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.build(0)
        torch.manual_seed(global_seed)
        return prepare(model, units, task=tiny.task)


def _find_partner(name: str) -> str:
    """The first of full and lora that the technique may be combined with."""
    for partner in ("full", "lora"):
        try:
            techniques.build_techniques([Unit(name=partner), Unit(name=name)])
        except RecipeError:
            continue
        return partner
    return "full"


def _train(prepared: PreparedModel, tiny: TinyModel, steps: int = _STEPS) -> None:
    parameters = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=_LR)
    prepared.attach(optimiser, steps_per_round=steps + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        prepared.model.train()
        for _ in range(steps):
            optimiser.zero_grad()
            prepared.task.compute_loss(prepared.model, tiny.make_batch(2)).backward()
            optimiser.step()
    prepared.detach()


def _check_gradients(name: str, tiny: TinyModel) -> None:
    prepared = _prepare(name, tiny)
    before = {one: parameter.detach().clone() for one, parameter in prepared.model.named_parameters()}
    _train(prepared, tiny, 1)
    named = dict(prepared.model.named_parameters())
    gradients = {one: parameter.grad for one, parameter in named.items() if parameter.grad is not None}
    require(any(bool(gradient.any()) for gradient in gradients.values()), "no parameter gets a gradient")
    odd = [one for one, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    require(not odd, f"the gradient of {odd[0] if odd else ''} is not finite")
    moved = [one for one, was in before.items() if not torch.equal(named[one], was)]
    frozen = [one for one in moved if not named[one].requires_grad]
    require(bool(moved), "a step moves nothing")
    require(not frozen, f"{frozen[0] if frozen else ''} is frozen, but a step moves it")


def _check_repeat(name: str, tiny: TinyModel) -> None:
    states = []
    for global_seed in range(2):
        prepared = _prepare(name, tiny, global_seed)
        _train(prepared, tiny)
        states.append({key: one.clone() for key, one in prepared.model.state_dict().items()})
    differing = [key for key, one in states[0].items() if not torch.equal(one, states[1][key])]
    require(not differing, f"{differing[0] if differing else ''} differs between two runs with the same seed")


def _check_travel(name: str, tiny: TinyModel) -> None:
    sender, receiver = _prepare(name, tiny), _prepare(name, tiny)
    _train(sender, tiny)
    names = {*sender.shared_names, *techniques.list_local_tensors(sender.model)}
    set_model_state(receiver.model, decode_tensors(pack(get_model_state(sender.model, sorted(names)))))
    one, other = _compute_outputs(sender.model, tiny), _compute_outputs(receiver.model, tiny)
    require(torch.equal(one, other), "a model that receives the shared tensors gives other outputs")


def _check_merge(name: str, tiny: TinyModel) -> None:
    prepared = _prepare(name, tiny)
    _train(prepared, tiny)
    before = _compute_outputs(prepared.model, tiny)
    after = _compute_outputs(prepared.merge(), tiny)
    error = float((after - before).norm() / before.norm())
    require(error <= _TOLERANCE, f"the merged model's outputs differ by {error:.2g} of their norm")


@torch.no_grad()
def _compute_outputs(model: nn.Module, tiny: TinyModel) -> Tensor:
    inputs = {name: tensor for name, tensor in tiny.make_batch(3).items() if name != "labels"}
    logits: Tensor = model.eval()(**inputs).logits
    return logits
