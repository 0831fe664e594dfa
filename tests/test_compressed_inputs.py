"""``int8-activations`` and ``division`` in whole models: what is kept, how far gradients are off, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.memory import StorageMeter
from fedtune.techniques._codecs.saved_inputs import has_codec
from tests.families import FAMILIES
from tests.mobile_nets import SmallNet, age
from tests.technique_steps import IMAGES, chosen, gradients, logits, shared


def flat(found: dict[str, Tensor], names: Any) -> Tensor:
    return torch.cat([found[name].flatten() for name in names])


def cosine(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return float(torch.cosine_similarity(flat(found, wanted), flat(wanted, wanted), 0))


def text_step(family: str, joined: str) -> tuple[dict[str, Tensor], int]:
    model = FAMILIES[family].model()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    shared(joined, model, FAMILIES[family].task)
    return gradients(model, FAMILIES[family].make_batch(rows=4, length=32))


@pytest.mark.parametrize(
    ("family", "joined", "share", "least"),
    [
        ("bert", "int8-activations+full", 0.6, 0.9999),
        ("vit", "int8-activations+full", 0.6, 0.9999),
        ("llama", "int8-activations+full", 0.8, 0.9999),
        ("bert", "division+full", 0.55, 0.99),
        ("vit", "division+full", 0.55, 0.97),
    ],
)
def test_less_is_kept_and_gradients_are_close(family: str, joined: str, share: float, least: float) -> None:
    wanted, plain = text_step(family, "full")
    found, kept = text_step(family, joined)
    assert kept < share * plain
    assert cosine(found, wanted) > least
    assert not torch.equal(flat(found, wanted), flat(wanted, wanted))


def image_step(joined: str, **settings: Any) -> tuple[dict[str, Tensor], int]:
    model = age(SmallNet())
    shared(joined, model, IMAGES, **settings)
    techniques.begin_round(chosen(joined, **settings), model, 1)
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batch = {"pixel_values": pictures, "labels": torch.arange(6) % 2}
    model.train()
    torch.manual_seed(3)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = IMAGES.compute_loss(model, batch)
        kept = meter.current_bytes
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, kept


def test_division_keeps_a_fifth_of_a_net_with_gradients_close() -> None:
    wanted, plain = image_step("full")
    found, kept = image_step("division+full")
    more, kept_more = image_step("division+full", bits=8, norm_bits=8)
    assert kept < 0.2 * plain
    assert kept < kept_more < plain
    assert cosine(found, wanted) > 0.8  # errors pass on through ten layers
    assert cosine(more, wanted) > 0.999 > cosine(found, wanted)


def test_without_tokens_division_leaves_texts_alone() -> None:
    model = FAMILIES["bert"].model()
    with pytest.raises(ModelError, match="no layer whose input division could keep"):
        techniques.begin_round(chosen("division+full"), nn.Sequential(nn.Dropout()), 1)
    shared("division+full", model, FAMILIES["bert"].task, tokens=False)
    assert {type(layer).__name__ for layer in model.modules() if has_codec(layer)} == {"GELUActivation", "Tanh"}


@pytest.mark.parametrize("joined", ["int8-activations+full", "division+full"])
def test_folded_it_leaves_nothing_behind(joined: str) -> None:
    model, plain = age(SmallNet()), age(SmallNet())
    shared(joined, model, IMAGES)
    for technique in chosen(joined):
        technique.merge_into_weights(model)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]
    assert not any("forward" in vars(layer) for layer in model.modules())
    batch = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
    assert torch.equal(logits(model, batch), logits(plain, batch))


def test_blocks_that_run_again_are_refused() -> None:
    for name in ("int8-activations", "division"):
        with pytest.raises(RecipeError, match="recomputed blocks keep no activations in another form; drop one"):
            chosen(f"{name}+gradient-checkpointing+full")
