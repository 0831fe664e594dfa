"""The two streams: published recurrences, exact inverses, the bits they need, and the guard."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedtune.errors import RecipeError
from fedtune.techniques.meft._halves import BottleneckAdapter
from fedtune.techniques.meft._two_streams import ReversibleStack, run_with_autograd
from fedtune.techniques.meft.meft import Meft
from tests.meft_models import VARIANTS, a_batch, equal, stack_of, twins
from tests.technique_steps import LANGUAGE, TEXT, chosen, gradients, logits, shared
from tests.tiny import bert


class ReadableBert:
    """A stack of BERT blocks written out with the adapters where the paper has them."""

    def __init__(self, stack: ReversibleStack) -> None:
        self.blocks = stack.blocks

    def attention(self, n: int, h: Tensor) -> Tensor:
        found: nn.Module = self.blocks[n].get_submodule("attention")
        context = found.get_submodule("output.dense")(found.get_submodule("self")(h, None)[0])
        if "attention" in adapters(self.blocks[n]):
            context = context + self.adapter(n, "attention", context)
        out: Tensor = found.get_submodule("output.LayerNorm")(context + h)
        return out

    def feed(self, n: int, a: Tensor) -> Tensor:
        block = self.blocks[n]
        fed = block.get_submodule("output.dense")(block.get_submodule("intermediate")(a))
        out: Tensor = block.get_submodule("output.LayerNorm")(fed + self.adapter(n, "feed", a) + a)
        return out

    def layer(self, n: int, h: Tensor) -> Tensor:
        return self.feed(n, self.attention(n, h))

    def adapter(self, n: int, kind: str, h: Tensor) -> Tensor:
        found = self.blocks[n].get_submodule(f"adapters.{kind}")
        assert isinstance(found, BottleneckAdapter)
        inner = nn.functional.gelu(h @ found.down_weight.T + found.down_bias)
        return inner @ found.up_weight.T + found.up_bias


def adapters(block: nn.Module) -> list[str]:
    return [name for name, _ in block.get_submodule("adapters").named_children()]


def meft1(net: ReadableBert, h: Tensor, lam: float, damping: float = 0.0) -> Tensor:
    """h_n = L_n(h_n-1) + lambda (h_n-2 + A_n-1(h_n-1) - damping h_n-1)."""
    other = h
    for n in range(len(net.blocks)):
        new = net.layer(n, h) + lam * (other - damping * h)
        if n < len(net.blocks) - 1:
            other = h + net.adapter(n, "stream", new)
        h = new
    return h


def meft2(net: ReadableBert, h: Tensor, beta: float) -> Tensor:
    """u_n = h_n-1 + A_n(u_n-1), h_n = L_n(u_n) + beta u_n-1."""
    u = h
    for n in range(len(net.blocks)):
        before, u = u, h + net.adapter(n, "stream", u)
        h = net.layer(n, u) + beta * before
    return h


def meft3(net: ReadableBert, h: Tensor, factor: float) -> Tensor:
    """a_n = lambda a_n-1 + Attention_n(h_n-1), h_n = beta h_n-1 + Feed_n(a_n)."""
    a = h
    for n in range(len(net.blocks)):
        a = factor * a + net.attention(n, h)
        h = factor * h + net.feed(n, a)
    return h


WRITTEN: dict[str, Callable[..., Tensor]] = {
    "meft1": meft1,
    "meft2": meft2,
    "meft3": meft3,
    "diff": partial(meft1, damping=1.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_coupling_is_the_published_recurrence(variant: str) -> None:
    model, _ = (one.double().eval() for one in twins("bert", variant=variant, mode="float", factor=0.1))
    stack, hidden = stack_of(model), torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        found = run_with_autograd(stack, hidden, [{"attention_mask": None}] * 3)
        torch.testing.assert_close(found, WRITTEN[variant](ReadableBert(stack), hidden, 0.1), rtol=1e-12, atol=1e-12)


def test_pieces_change_nothing_but_the_order_of_sums() -> None:
    for family, task in (("bert", TEXT), ("qwen2-sliding", LANGUAGE)):
        whole, _ = twins(family)
        for pieces in (2, 3, 100):
            model, _ = twins(family, pieces=pieces)
            torch.testing.assert_close(logits(model, a_batch(task)), logits(whole, a_batch(task)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_vanishing_factor_leaves_the_pretrained_network(family: str) -> None:
    model, _ = twins(family, mode="float", factor=1e-9)
    for name, parameter in model.named_parameters():
        if ".adapters." in name and ".up_" in name:
            parameter.data.zero_()
    found = logits(model, a_batch(TEXT if family == "bert" else LANGUAGE))
    for block in stack_of(model).blocks:
        del block.__dict__["forward"]
    wanted = logits(model, a_batch(TEXT if family == "bert" else LANGUAGE))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_undone_to_the_bit(variant: str) -> None:
    model, _ = twins("llama", variant=variant)
    model.eval()
    stack, call = stack_of(model), {"position_embeddings": rotation(4), "attention_mask": None}
    x = stack.make_streams(torch.randn(2, 4, 16))
    with torch.no_grad():
        y, whole = stack.forward_block(0, x, call, None, torch.float32)
        assert whole
        y1, y2 = stack.swap_streams(y)
        x2 = stack.recover_x2(y2, stack.run_half(stack.g_stages(0), 0, y1.float(), call, None))
        x1 = stack.recover_x1(y1, x2, stack.run_half(stack.f_stages(0), 0, x2.float(), call, None))
    assert torch.equal(x1, x[0])
    assert torch.equal(x2, x[1])
    assert not torch.equal(y1, x1)


def rotation(tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[None, :, None] * torch.ones(8)
    return angles.cos(), angles.sin()


def test_streams_are_doubles_on_the_grid() -> None:
    model, _ = twins("bert")
    stack = stack_of(model)
    grid = stack.plan.grid
    assert grid is not None
    x = stack.make_streams(torch.randn(1, 2, 16))[0]
    assert x.dtype == torch.float64
    assert torch.equal((x * 2.0**grid).round(), x * 2.0**grid)
    assert not torch.equal((x * 2.0 ** (grid - 4)).round(), x * 2.0 ** (grid - 4))


def test_rounding_passes_gradients_straight_through() -> None:
    model, _ = twins("bert")
    x = torch.randn(3, 4, requires_grad=True)
    stack_of(model).round_to_grid(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("variant", "factor", "bits", "blocks", "cuts"),
    [
        ("diff", 0.125, 28, 6, ()),
        ("diff", 0.125, 28, 16, ()),  # eight scalings of 3 bits fit 53 - 28
        ("diff", 0.125, 28, 17, (8,)),
        ("diff", 0.125, 28, 30, (15,)),
        ("meft1", 0.0625, 28, 30, (9, 20)),  # six scalings of 4 bits: twelve blocks between cuts
        ("meft3", 0.125, 28, 30, (7, 15, 22)),  # both streams are scaled in every block: eight blocks between cuts
        ("meft3", 1.0, 28, 30, ()),
        ("diff", 0.5, 48, 30, (9, 20)),
    ],
)
def test_cuts_are_the_fewest_that_the_bits_of_a_double_allow(
    variant: str, factor: float, bits: int, blocks: int, cuts: tuple[int, ...]
) -> None:
    found = Meft(variant=variant, scaling_factor=factor, value_bits=bits)._cuts(blocks)
    assert found == cuts
    bounds = [-1, *cuts, blocks]
    longest = max(after - before - 1 for before, after in pairwise(bounds))
    scalings = longest if variant == "meft3" else -(-longest // 2)
    assert bits + scalings * -torch.tensor(factor).log2().int() <= 53


def test_the_guard_keeps_a_block_whose_streams_outgrow_the_measured_range() -> None:
    model, stored = twins("llama")
    for one in (model, stored):
        one.get_parameter("model.embed_tokens.weight").data *= 2.0**34
        for block in stack_of(one).blocks[:-1]:
            block.get_parameter("adapters.stream.up_weight").data.zero_()
            block.get_parameter("adapters.stream.up_bias").data.fill_(0.1)  # too fine a number beside so large ones
    batch = a_batch(LANGUAGE)
    assert record_kept(stack_of(model), batch, model)
    assert equal(gradients(model, batch)[0], gradients(stored, batch)[0])


def record_kept(stack: ReversibleStack, batch: dict[str, Tensor], model: nn.Module) -> set[int]:
    """The blocks whose inputs a forward pass keeps though no cut was planned there."""
    seen: set[int] = set()
    push = stack.forward_block

    def watched(index: int, *others: object) -> object:
        y, whole = push(index, *others)  # type: ignore[arg-type]
        seen.update([] if whole else [index])
        return y, whole

    stack.__dict__["forward_block"] = watched
    with torch.no_grad():
        model(**batch)
    del stack.__dict__["forward_block"]
    return seen


def test_an_ordinary_model_trips_no_guard() -> None:
    for family, task in (("llama", LANGUAGE), ("bert", TEXT)):
        model, _ = twins(family)
        assert not record_kept(stack_of(model), a_batch(task), model)


def test_adapters_start_small_and_are_drawn_from_the_seed_alone() -> None:
    one, other, third = bert(), bert(), bert()
    for model, seed in ((one, 1), (other, 1), (third, 2)):
        torch.manual_seed(seed * 100)
        shared("meft", model, TEXT, seed=seed, rank=64)
    weights = torch.cat(
        [p.flatten() for name, p in one.named_parameters() if ".adapters." in name and "weight" in name]
    )
    assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.03)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))
        if ".adapters." in name and name.endswith("bias"):
            assert not parameter.any()
        elif ".adapters." in name:
            assert not torch.equal(parameter, third.get_parameter(name))


@pytest.mark.parametrize(
    ("variant", "merge", "count"), [("diff", "main", 5), ("meft1", "mean", 6), ("meft2", "main", 6)]
)
def test_what_is_trained_is_two_adapters_per_block_and_the_head(variant: str, merge: str, count: int) -> None:
    model = bert(num_hidden_layers=3)
    names = shared("meft", model, TEXT, variant=variant, merge=merge, rank=4)
    assert {name for name in names if ".adapters." not in name} == {"classifier.weight", "classifier.bias"}
    numbers = sum(model.get_parameter(name).numel() for name in names if ".adapters." in name)
    assert numbers == count * (2 * 4 * 16 + 4 + 16)


def test_exact_factors_are_powers_of_two() -> None:
    with pytest.raises(
        RecipeError, match=r"meft: scaling_factor 0.1 is not a power of two; set it to 0.125, or set arithmetic: float"
    ):
        chosen("meft", factor=0.1)
    assert chosen("meft", factor=0.1, mode="float")
    with pytest.raises(ValidationError):
        Meft(scaling_factor=0)
