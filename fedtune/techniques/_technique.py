"""The shape every technique has: frozen settings with a few behaviours, each of which may stay silent."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.tasks import Task
from fedtune.techniques._saving import allow_saving
from fedtune.wire.client_update import LowRankPair, TensorSpec, UpdateKind

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["ExtraPayload", "StepInfo", "Technique", "list_head_parameters", "unfreeze_parameters"]


class StepInfo(NamedTuple):
    """A step within a client's round: rounds count from 1, steps from 0; the run's first and present rate."""

    round: int
    step: int
    local_steps: int
    base_lr: float
    lr: float


class ExtraPayload(NamedTuple):
    """What a client added to its contribution, and the weight it has among the clients of the round."""

    weight: float
    tensors: Mapping[str, Tensor]


class Technique(NamedUnit):
    """One published way to make fine-tuning fit a device; its fields are its knobs."""

    selects_trainable_tensors: ClassVar[bool] = True
    """Whether it chooses what is trained; a run needs at least one technique that does."""
    conflicts_with: ClassVar[Mapping[str, str]] = {}
    """Names of techniques it makes no sense with, and why: the rest of a sentence that ends there."""

    def find_conflict(self, other: "Technique") -> str | None:
        """Why it cannot be combined with another as both are set: the rest of a sentence; None when it can."""
        return self.conflicts_with.get(other.name)

    def make_quantisation_config(self) -> Any:
        """How the frozen base is to be quantised while it is loaded: a transformers configuration, or None."""
        return None

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Rewrite the model and switch on gradients of what is trained; ModelError if the model does not fit."""

    def begin_round(self, model: nn.Module, number: int) -> None:
        """Choose what is trained in round 1, 2, ... among what ``apply`` made trainable."""

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Before the forward pass of a step: its inputs, and the share 0..1 of all steps of the run that is over.

        Scoring calls it too, with ``progress`` 1. Terms of the loss that layers produce are handed in by ``emit``.
        """

    def before_optimiser_step(self, model: nn.Module, moment: StepInfo) -> float:
        """Between a step's backward pass and its update: change gradients, and say the learning rate to take."""
        return moment.lr

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """Names of tensors that belong to the shared state though clients do not train them."""
        return []

    def has_local_tensors(self) -> bool:
        """Whether devices keep trained tensors for themselves: what the server holds is then not a whole model."""
        return False

    def has_weight_masks(self) -> bool:
        """Whether the shared state says of each weight if it is there: all clients must then go by the same masks."""
        return False

    def changes_per_round(self) -> bool:
        """Whether rounds differ in what is trained or kept, so that an answer fits the round it was begun in alone."""
        return self.has_weight_masks()

    def get_update_kind(self) -> UpdateKind:
        """What clients train, as a merge must know it before it can be chosen."""
        return "tensors"

    def list_low_rank_pairs(self, model: nn.Module) -> list[LowRankPair]:
        """The low-rank pairs it put into the model."""
        return []

    def declare_extra_payload(self, model: nn.Module, number: int) -> dict[str, TensorSpec]:
        """What each client adds to its contribution in round ``number``, by name."""
        return {}

    def compute_extra_payload(self, model: nn.Module, number: int, backward: Callable[[], None]) -> dict[str, Tensor]:
        """On a client that has trained: the tensors asked for. ``backward`` takes the gradient of one batch."""
        return {}

    def after_aggregation(
        self, state: Mapping[str, Tensor], number: int, answers: Sequence[ExtraPayload]
    ) -> dict[str, Tensor]:
        """On the server, once a round is merged: the shared state in the light of the clients' answers."""
        return dict(state)

    @contextmanager
    def collect_metrics(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Follow the scoring of held-out examples inside the block; the callable gives figures by name at its end."""
        yield dict

    def make_reference(self) -> "Technique | None":
        """What trains the same network with every activation stored, for checking gradients; None to leave it out."""
        return self

    def has_unchanged_base(self) -> bool:
        """Whether the pretrained layers compute what they did, so that an adapter beside them says it all."""
        return True

    def make_peft_config(self, model: nn.Module, task: Task) -> "PeftConfig | None":
        """How PEFT describes what was trained, when PEFT can carry it beside the untouched base."""
        return None

    def beside(self, model: nn.Module, drawn: Sequence[str]) -> dict[str, Tensor] | None:
        """Frozen parameters, by the names they were loaded under, as they are with what was learned beside them.

        ``drawn`` are those that no base holds; None when an adapter cannot carry them.
        """
        return None if drawn else {}

    @final
    def merge_into_weights(self, model: nn.Module) -> None:
        """Write what was learned into plain layers, so that the model needs nothing of this technique."""
        self._fold(model)
        allow_saving(model, self.name)

    def _fold(self, model: nn.Module) -> None:
        """What ``fold`` does; a technique that leaves layers plain has nothing to do."""


def list_head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters behind the backbone: the new head of a classifier."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = f"{prefix}." if prefix and prefix in dict(model.named_children()) else None
    if inside is None:
        last = [name for name, child in model.named_children() if any(True for _ in child.parameters())][-1]
        return [name for name, _ in model.named_parameters() if name.startswith(f"{last}.")]
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def unfreeze_parameters(model: nn.Module, names: list[str]) -> None:
    """Switch on gradients of the named parameters; ModelError when there is none to switch on."""
    if not names:
        raise ModelError(f"{type(model).__name__} has none of the parameters this technique trains; choose another")
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
