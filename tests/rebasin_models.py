"""Nets with units to permute, drawn so that no weight is what a forgotten permutation would leave unseen."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from fedtune.merging import MergeInput
from fedtune.merging.align.rebasin._architecture_tables import build_spec_from_tables, has_architecture_table
from fedtune.merging.align.rebasin._graph_tracing import trace_permutation_spec
from fedtune.merging.align.rebasin._permutations import (
    Permutation,
    PermutationKind,
    Permutations,
    PermutationSpec,
    UnitLayout,
)
from fedtune.models.classifier import ImageClassifier
from tests.own_nets import net
from tests.tiny import bert, llama

__all__ = [
    "NETS",
    "TEXT",
    "Residual",
    "arrangement",
    "batch_for",
    "convolutional",
    "drawn",
    "grouped_llama",
    "inverse",
    "lively",
    "mlp",
    "operand",
    "outputs",
    "pictures",
    "read",
    "shuffled",
    "symmetry_of",
    "text",
    "zeros",
]


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every tensor, norms and running statistics too."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
            elif tensor.is_floating_point():
                fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 10
                noise = torch.randn(tensor.shape, generator=random) / fan**0.5
                tensor.copy_(noise if tensor.dim() > 1 else tensor + noise)
    return model.eval()


def lively(model: nn.Module) -> nn.Module:
    """Softplus for ReLU: no unit is silent on all inputs, and so correlates with none."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return model


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    sizes = widths or (12, 16, 16, 5)
    layers = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


_NORMS: dict[str, Any] = {
    "none": lambda channels, side: nn.Identity(),
    "batch": lambda channels, side: nn.BatchNorm2d(channels),
    "group": lambda channels, side: nn.GroupNorm(4, channels),
    "one group": lambda channels, side: nn.GroupNorm(1, channels),
    "layer": lambda channels, side: nn.LayerNorm([channels, side, side]),
    "instance": lambda channels, side: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
}


def convolutional(norm: str = "none") -> nn.Sequential:
    """Two convolutions and two layers after a flattening; 3 x 8 x 8 in, 5 logits out."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), _NORMS[norm](8, 8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), _NORMS[norm](8, 4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 5)),
    )


class Residual(nn.Module):
    """Functions in place of modules, a projected shortcut and a stream that two blocks write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.narrow, self.shortcut = nn.Conv2d(8, 10, 3, 2, 1), nn.Conv2d(8, 10, 1, 2)
        self.head = nn.Linear(10, 5)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = F.relu(self.norm(self.stem(input)))
        x = (x + self.outer(torch.relu(self.inner(x)))).relu()
        x = F.relu(self.narrow(x) + self.shortcut(x))
        out: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return out


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=1)
    )


def roberta() -> RobertaForSequenceClassification:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_labels": 3}
    return RobertaForSequenceClassification(
        RobertaConfig(**sizes, vocab_size=40, num_hidden_layers=2, max_position_embeddings=20)
    )


def grouped_llama(*, tied: bool = True) -> nn.Module:
    """Nine heads of width 4 in three groups."""
    made = llama(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=tied)
    made.eval()
    return made


NETS: dict[str, Any] = {
    "mlp": mlp,
    **{f"convolutional, norm {norm}": lambda norm=norm: convolutional(norm) for norm in _NORMS},
    "residual": Residual,
    "resnet18": lambda: net("resnet18", small=True, width=8),
    "mobilenet-v2": lambda: net("mobilenet-v2"),
    "mobilenet-v3-small": lambda: net("mobilenet-v3-small"),
    "efficientnet-lite": lambda: net("efficientnet-lite"),
}
TEXT: dict[str, Any] = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "llama": grouped_llama}


def symmetry_of(model: nn.Module) -> PermutationSpec:
    return build_spec_from_tables(model) if has_architecture_table(model) else trace_permutation_spec(model)


def pictures(count: int = 6, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def text(rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (rows, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batch_for(model: nn.Module, rows: int = 6) -> dict[str, Tensor]:
    """Inputs by the name the model gives them."""
    if has_architecture_table(model):
        return text(rows)
    if isinstance(model, ImageClassifier):
        return {"pixel_values": pictures(rows, side=32)}
    flat = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear)
    return {"input": pictures(rows, 2).reshape(rows, 12) if flat else pictures(rows)}


def outputs(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits in double precision, of the model with its own or other weights."""
    model = copy.deepcopy(model).double()
    model.load_state_dict(state or {}, strict=state is not None)
    batch = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch_for(model).items()
    }
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(found, Tensor) else found.logits


def arrangement(kind: PermutationKind, random: torch.Generator) -> Permutation:
    """A random order that a kind allows."""

    def shuffles(count: int, size: int) -> Tensor:
        return torch.stack([torch.randperm(size, generator=random) for _ in range(count)])

    if isinstance(kind, UnitLayout):
        width = kind.size // kind.groups
        blocks = shuffles(kind.groups, width) + torch.randperm(kind.groups, generator=random)[:, None] * width
        return {"": blocks.flatten()}
    groups = torch.randperm(kind.num_kv_heads, generator=random)
    fixed = torch.arange(kind.qk).expand(kind.num_kv_heads, -1)
    qk = fixed if kind.is_rotary else shuffles(kind.num_kv_heads, kind.qk)
    return kind.build_permutation(
        groups, shuffles(kind.num_kv_heads, kind.queries_per_kv_head), qk, shuffles(kind.num_kv_heads, kind.v)
    )


def shuffled(symmetry: PermutationSpec, seed: int = 0) -> Permutations:
    random = torch.Generator().manual_seed(seed)
    return {name: arrangement(kind, random) for name, kind in symmetry.kinds.items()}


def inverse(orders: Permutations) -> Permutations:
    return {name: {part: at.argsort() for part, at in parts.items()} for name, parts in orders.items()}


def read(state: Mapping[str, Tensor]) -> Any:
    return lambda name: state[name]


def zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def operand(base: Mapping[str, Tensor], state: Mapping[str, Tensor], weight: float = 0.5) -> MergeInput:
    """A model as its delta to a base."""

    def rows(name: str, start: int, stop: int) -> Tensor:
        delta = state[name] - base[name]
        return delta[start:stop] if delta.dim() else delta

    return MergeInput(rows, weight)
