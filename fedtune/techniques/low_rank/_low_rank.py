"""The base class of LoRA and QLoRA: attaches low-rank pairs, and chooses which factor is trained in which round.

Averaging both factors of several clients is wrong: mean(B) mean(A) is not mean(B A). Exact schemes train one factor
at a time while the other is common to all clients, so that the mean of the trained factor gives the mean of the
products: sum_i w_i (B_i A) = (sum_i w_i B_i) A. If both are trained, use a step that merges pairs.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedtune.errors import FedtuneWarning, ModelError
from fedtune.loaded_classes import find_loaded_class, is_loaded_instance
from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.paging.paged_layers import PagedLinear
from fedtune.models.read_past import read_past
from fedtune.tasks import Task
from fedtune.techniques._technique import Technique, list_head_parameters, unfreeze_parameters
from fedtune.techniques.low_rank._paired_linear import PairSettings, add_plain_pairs, is_pair_layer
from fedtune.techniques.low_rank._untargeted_matrices import describe_untargeted_matrices, needs_conv_shapes
from fedtune.wire.client_update import LowRankPair, UpdateKind

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

__all__ = ["LowRankTechnique", "dequantise_linear", "find_target_modules", "list_factors", "list_lora_layers"]


class LowRankTechnique(Technique):
    """Low-rank pairs beside frozen linear layers."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, description="the product is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field("all-linear", description="or endings of layer names")
    trained_factors: Literal["alternate", "b-only", "both", "both-and-base"] = Field(
        "alternate",
        description="alternate: B in odd rounds, A in even ones (RoLoRA), at one to three times the usual rate; b-only "
        "(FFA-LoRA): B alone; both: for merge: fedit, flexlora, hetlora; both-and-base: the base shared, for "
        "merge: fedex-lora, flora",
    )

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Attach A (random, from ``seed``) and B (zero) to the linear layers; train them and a classifier's head."""
        head = _head(model, task)
        targets = find_target_modules(model, head, self.target_modules)
        if self.target_modules == "all-linear" and (left := describe_untargeted_matrices(model, targets, head)):
            warnings.warn(f"{self.name} {left}", FedtuneWarning, stacklevel=2)
        _keep_four_bit_layout(model)
        self._add_pairs(model, targets, seed)
        unfreeze_parameters(model, [*list_factors(model, "A"), *list_factors(model, "B"), *head])
        self._freeze(model, "A", self.trained_factors == "b-only")

    def _add_pairs(self, model: nn.Module, targets: list[str], seed: int) -> None:
        settings = PairSettings(self.rank, self.alpha, self.dropout)
        if isinstance(model, BlockModel):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_plain_pairs(model, targets, self.list_pair_names(), settings)
            return
        from fedtune.techniques.low_rank._pair_injection import inject_pairs  # it needs PEFT

        inject_pairs(model, targets, self.list_pair_names(), settings, seed)

    def list_pair_names(self) -> list[str]:
        """Names of the pairs that each layer gets."""
        return ["default"]

    def begin_round(self, model: nn.Module, round_number: int) -> None:
        """Train B in odd rounds and A in even ones when alternating."""
        if self.trained_factors == "alternate":
            self._freeze(model, "A", round_number % 2 == 1)
            self._freeze(model, "B", round_number % 2 == 0)

    def list_server_held_tensors(self, model: nn.Module) -> list[str]:
        """The base weights, if the merge changes them."""
        return [pair.base for pair in self.list_low_rank_pairs(model) if pair.base is not None]

    def changes_per_round(self) -> bool:
        """Rounds differ if the factors alternate."""
        return self.trained_factors == "alternate"

    def get_update_kind(self) -> UpdateKind:
        """One factor, if the other one is common to all clients in each round; otherwise pairs."""
        both: UpdateKind = "pairs and base" if self.trained_factors == "both-and-base" else "pairs"
        return "one factor" if self.trained_factors in ("alternate", "b-only") else both

    def list_low_rank_pairs(self, model: nn.Module) -> list[LowRankPair]:
        """B and A of each layer; the weights of GPT-2's layers are transposed."""
        shared_base = self.trained_factors == "both-and-base"
        layers = list_lora_layers(model)
        return [_pair(name, layer, pair, shared_base) for name, layer in layers for pair in layer.lora_A]

    def has_unchanged_base(self) -> bool:
        """Base weights change if they are shared."""
        return self.trained_factors != "both-and-base"

    def make_peft_config(self, model: nn.Module, task: Task) -> "PeftConfig | None":
        """The configuration of the layers, with the head as a module that is saved whole.

        None for a model that reads the shape of a convolution, because PEFT's layers do not have it, and for several
        pairs.
        """
        if needs_conv_shapes(model) or len(self.list_pair_names()) > 1:
            return None
        configurations: dict[str, LoraConfig] = vars(model)["peft_config"]
        config = configurations["default"]
        config.modules_to_save = sorted({name.split(".")[0] for name in _head(model, task)}) or None
        config.task_type = task.peft_type
        config.inference_mode = True
        return config

    def compute_merged_weights(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Weights plus products."""
        found = {}
        for name in names:
            owner, _, last = name.rpartition(".")
            layer: Any = model.get_submodule(owner)
            base = layer.get_base_layer() if is_pair_layer(layer) else layer
            value = base.get_parameter(last).detach()
            added = is_pair_layer(layer) and last == "weight"
            found[name] = value + _sum_products(layer) if added else value.clone()
        return found

    def _fold(self, model: nn.Module) -> None:
        """W + (alpha / rank) B A as plain layers; four-bit weights are expanded first."""
        for name, layer in list_lora_layers(model):
            base = layer.get_base_layer()
            plain = dequantise_linear(base)
            with torch.no_grad():
                plain.weight += _sum_products(layer).to(plain.weight.dtype)
            model.set_submodule(name, _restore_class(plain, base))
        for name, layer in list(model.named_modules()):
            if _is_four_bit(layer):
                model.set_submodule(name, _restore_class(dequantise_linear(layer), layer))
        vars(model).pop("peft_config", None)  # PEFT would take the model for one with an adapter

    def _freeze(self, model: nn.Module, factor: str, frozen: bool) -> None:
        parameters = dict(model.named_parameters())
        for name in list_factors(model, factor):
            parameters[name].requires_grad_(not frozen)


def find_target_modules(model: nn.Module, head: list[str], targets: Literal["all-linear"] | list[str]) -> list[str]:
    """Names of the linear layers (point-wise convolutions among them) that carry an adapter; never the head."""
    excluded = {name.rpartition(".")[0] for name in head} | {_output_embeddings(model), *read_past(model)}
    linear = [name for name, layer in model.named_modules() if _is_linear(layer) and name not in excluded]
    chosen = linear if targets == "all-linear" else [n for n in linear if n.endswith(tuple(targets))]
    if not linear:
        raise ModelError(f"{type(model).__name__} has no plain linear layer to put a low-rank pair beside; take full")
    if not chosen:
        raise ModelError(f"no linear layer of {type(model).__name__} ends in {targets}; give endings such as query")
    return chosen


def dequantise_linear(layer: nn.Module) -> nn.Module:
    """A four-bit or paged layer as a plain one with the same function; any other layer itself."""
    if isinstance(layer, PagedLinear):
        return layer.make_plain()
    return _expand_four_bits(layer) if _is_four_bit(layer) else layer


def _expand_four_bits(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit  # loaded, because the layer is

    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _is_four_bit(layer: nn.Module) -> bool:
    return is_loaded_instance(layer, "bitsandbytes.nn", "Linear4bit")


def _is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is one of GPT-2's, which hold their weights transposed."""
    return is_loaded_instance(layer, *_CONV1D)


_CONV1D = "transformers.pytorch_utils", "Conv1D"


def _restore_class(plain: nn.Module, four_bit: nn.Module) -> nn.Module:
    """A layer of the class that was quantised: GPT-2's hold their weights transposed."""
    conv1d: Any = find_loaded_class(*_CONV1D)
    if not isinstance(plain, nn.Linear) or getattr(four_bit, "source_cls", None) is not conv1d or conv1d is None:
        return plain
    made: nn.Module = conv1d(plain.out_features, plain.in_features)
    made.weight = nn.Parameter(plain.weight.detach().T.contiguous(), requires_grad=False)
    if plain.bias is not None:
        made.bias = plain.bias
    return made


def _keep_four_bit_layout(model: nn.Module) -> None:
    """No scoring pass may repack the weights for processors with AVX512-BF16: no gradient passes such layers."""
    for layer in model.modules():
        if _is_four_bit(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False


def _head(model: nn.Module, task: Task) -> list[str]:
    return list_head_parameters(model) if task.has_new_head else []


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer only multiplies by its weight: some kinds standardise the weight first, others never run.

    Layers of fedtune store less for the backward pass, but compute the same as plain ones.
    """
    plain = type(layer).forward in _list_plain_forwards() or type(layer).__module__.startswith("fedtune.")
    if not plain or isinstance(layer, NonDynamicallyQuantizableLinear):
        return False
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return pointwise or isinstance(layer, nn.Linear) or _is_transposed(layer)


def _list_plain_forwards() -> list[Any]:
    """The forward functions of plain layers."""
    others = [find_loaded_class(*one) for one in (_CONV1D, ("bitsandbytes.nn", "Linear4bit"))]
    return [kind.forward for kind in (nn.Linear, nn.Conv2d, *others) if kind is not None]


def _output_embeddings(model: nn.Module) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    output = get() if get else None
    return next((name for name, layer in model.named_modules() if layer is output), None) if output else None


def list_lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers with pairs, by name."""
    return [(name, layer) for name, layer in model.named_modules() if is_pair_layer(layer)]


def _pair(name: str, layer: Any, pair: str, shared_base: bool) -> LowRankPair:
    left, right = (f"{name}.lora_{factor}.{pair}.weight" for factor in "BA")
    base = f"{name}.base_layer.weight" if shared_base else None
    return LowRankPair(left, right, float(layer.scaling[pair]), base, _is_transposed(layer.get_base_layer()))


def _sum_products(layer: Any) -> Any:
    """The scaled products of all pairs of a layer."""
    first, *others = (layer.get_delta_weight(pair) for pair in layer.lora_A)
    return sum(others, first)


def list_factors(model: nn.Module, factor: str) -> list[str]:
    """Return the names of all A or of all B."""
    return [name for name, _ in model.named_parameters() if f".lora_{factor}." in name]
