"""The base class of all techniques, and the values that its hooks receive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, final

from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.tasks import Task
from fedtune.techniques._saving import allow_saving
from fedtune.wire.client_update import LowRankPair, TensorSpec, UpdateKind

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "ExtraPayload",
    "StepEstimator",
    "StepInfo",
    "Technique",
    "list_head_parameters",
    "unfreeze_parameters",
]


class StepInfo(NamedTuple):
    """A step of a local round, with the run's first and present learning rate. Rounds count from 1, steps from 0."""

    round: int
    step: int
    local_steps: int
    base_lr: float
    lr: float


class ExtraPayload(NamedTuple):
    """The tensors that a client added to its update, and the client's weight in the round."""

    weight: float
    tensors: Mapping[str, Tensor]


class StepEstimator(Protocol):
    """Takes the place of the backward pass and of the optimiser in the steps of a round."""

    def estimate_slope(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        """Estimate what a step needs from losses of its batch, without gradients; return the loss.

        The model is the same afterwards, so that it may be called again for the same step.
        """
        ...

    def step(self, lr: float) -> None:
        """Move the weights by the last estimate."""
        ...


class Technique(NamedUnit):
    """One published way to make fine-tuning fit a device. Its fields are its settings; every hook is optional."""

    selects_trainable_tensors: ClassVar[bool] = True
    """Whether it selects trained tensors; a run needs at least one technique that does."""
    has_exact_gradients: ClassVar[bool] = True
    """Whether gradients are those of the plain model, or of one with adapters, up to rounding."""
    estimates_gradients: ClassVar[bool] = False
    """Whether its steps take an estimate in the place of a backward pass, see ``make_step_estimator``."""
    replaces_update: ClassVar[bool] = False
    """Whether clients send its tensors in the place of those that other techniques train."""
    fits_zeroth_order: ClassVar[bool] = False
    """Whether it neither reads gradients nor changes what a backward pass keeps, and lets two passes over a batch
    differ by the weights alone."""
    replaces_loss: ClassVar[bool] = False
    """Whether it works inside the loss that the model computes from its labels, and not where another loss is taken."""
    allows_kv_cache: ClassVar[bool] = False
    """Whether text can be generated with cached keys and values: the model computes each token from those before it."""
    conflicts_with: ClassVar[Mapping[str, str]] = {}
    """Techniques that it cannot be combined with, and why: the end of a sentence."""

    unsupported_devices: ClassVar[Mapping[str, str]] = {}
    """Device types that it cannot compute on, and why: the end of a sentence."""

    needed_memory: ClassVar[str | None] = None
    """The continual method that a stream must have for it."""

    paged_base_problem: ClassVar[str | None] = "was not made for a base whose weights are in a file"
    """Why it cannot be combined with ``model.paged``; None if it neither trains nor reads the matrices of the base."""

    fits_plain_blocks: ClassVar[bool] = False
    """Whether it works on the models of ``fedtune.models.blocks``, which are not transformers' classes."""

    renewed_tensors: ClassVar[str | None] = None
    """Why an entry of a trained tensor is another one in the next round, as the end of a sentence; None if not."""

    def find_conflict(self, other: "Technique") -> str | None:
        """Why both cannot be combined with their settings, as the end of a sentence; None if they can."""
        return self.conflicts_with.get(other.name)

    def make_quantisation_config(self) -> Any:
        """The quantisation configuration of transformers for loading the frozen base; None for no quantisation."""
        return None

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Rewrite the model and unfreeze what is trained; ModelError if the model does not fit."""

    def follow_stream(self, visits: Sequence[tuple[int, int]], *, together: bool) -> "Technique":
        """The technique in a stream whose visits have these tasks and rounds; itself by default.

        Unless ``together``, clients may be in different tasks in the same round. RecipeError if it cannot follow.
        """
        return self

    def for_depth(self, blocks: int, fewest: int) -> "Technique | None":
        """The technique as a plan traces it on a few of a model's like blocks; itself by default.

        What it keeps must then grow by the same bytes with each block, from ``fewest`` up to ``blocks``. None if that
        cannot be.
        """
        return self

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Choose what is trained in round 1, 2, ... among the tensors that ``rewrite_model`` unfroze."""

    def begin_step(self, model: nn.Module, batch: Mapping[str, Tensor], progress: float) -> None:
        """Called before the forward pass of a step, with its inputs and the share 0..1 of the run that is completed.

        Evaluation calls it too, with ``progress`` 1. Layers add terms to the loss by ``add_loss_term``.
        """

    def make_step_estimator(
        self, model: nn.Module, masters: Mapping[str, nn.Parameter], seed: int
    ) -> StepEstimator | None:
        """Return what takes the steps of a round without a backward pass; None for ordinary steps.

        ``masters`` are copies in single precision of trained parameters of a lower one, by name. All random numbers of
        the round are derived from ``seed``.
        """
        return None

    def before_optimiser_step(self, model: nn.Module, step_info: StepInfo) -> float:
        """Called after the backward pass: may change gradients; returns the learning rate of the step."""
        return step_info.lr

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """Names of tensors that belong to the shared state, but are not trained by clients."""
        return []

    def has_local_tensors(self) -> bool:
        """Whether trained tensors stay on the devices, so that the server's state is not a whole model."""
        return False

    def has_weight_masks(self) -> bool:
        """Whether the shared state contains weight masks, which all clients must then share."""
        return False

    def changes_per_round(self) -> bool:
        """Whether rounds differ in what is trained, so that a client update fits only the round it was trained for."""
        return self.has_weight_masks()

    def get_update_kind(self) -> UpdateKind:
        """The kind of client updates, which decides which merges are possible."""
        return "tensors"

    def list_low_rank_pairs(self, model: nn.Module) -> list[LowRankPair]:
        """The low-rank pairs that it added to the model."""
        return []

    def declare_extra_payload(self, model: nn.Module, round_number: int) -> dict[str, TensorSpec]:
        """The tensors that each client adds to its update in this round, by name."""
        return {}

    def compute_extra_payload(
        self, model: nn.Module, round_number: int, run_backward: Callable[[], None]
    ) -> dict[str, Tensor]:
        """The tensors that a client adds after training; ``run_backward`` computes the gradients of one batch."""
        return {}

    def after_aggregation(
        self, state: Mapping[str, Tensor], round_number: int, extra_payloads: Sequence[ExtraPayload]
    ) -> dict[str, Tensor]:
        """Called on the server after a merge: the next shared state, given the extra payloads of the clients."""
        return dict(state)

    @contextmanager
    def collect_metrics(self, model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
        """Measure while held-out examples are evaluated inside the block; the callable returns metrics by name."""
        yield dict

    def make_reference(self) -> "Technique | None":
        """The technique that trains the same network with all activations stored, to check gradients; or None."""
        return self

    def has_unchanged_base(self) -> bool:
        """Whether pretrained layers still compute the same, so that an adapter contains all that was trained."""
        return True

    def make_peft_config(self, model: nn.Module, task: Task) -> "PeftConfig | None":
        """The PEFT configuration of what was trained; None if a PEFT adapter cannot contain it."""
        return None

    def compute_merged_weights(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor] | None:
        """Frozen parameters with the trained adapters merged, by the names they were loaded under.

        An exported adapter includes them if no base contains them; None if it cannot.
        """
        return None if names else {}

    @final
    def merge_into_weights(self, model: nn.Module) -> None:
        """Merge what was trained into plain layers, so that the model no longer needs this technique."""
        self._fold(model)
        allow_saving(model, self.name)

    def _fold(self, model: nn.Module) -> None:
        """The work of ``merge_into_weights``; nothing for a technique that does not replace layers."""


def list_head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters after the backbone: the new head of a classifier."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    inside = f"{prefix}." if prefix and prefix in dict(model.named_children()) else None
    if inside is None:
        last = [name for name, child in model.named_children() if any(True for _ in child.parameters())][-1]
        return [name for name, _ in model.named_parameters() if name.startswith(f"{last}.")]
    return [name for name, _ in model.named_parameters() if not name.startswith(inside)]


def unfreeze_parameters(model: nn.Module, names: list[str]) -> None:
    """Unfreeze the named parameters; ModelError if there are none."""
    if not names:
        raise ModelError(f"{type(model).__name__} has none of the parameters this technique trains; choose another")
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
