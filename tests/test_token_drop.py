"""``token-drop``: the choice against a slow twin, what the kept and the dropped tokens compute, and what is kept."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.memory import StorageMeter
from fedtune.techniques.token_drop._token_blocks import TokenChoice, choose_tokens, find_real_tokens, score_blocks
from tests.families import FAMILIES
from tests.technique_steps import LANGUAGE, chosen, shake
from tests.tiny import llama

SIZE = 4


def a_llama(layers: int = 4) -> PreTrainedModel:
    return llama(num_hidden_layers=layers, hidden_size=16, num_attention_heads=4, num_key_value_heads=2)


def a_batch(rows: int = 3, length: int = 22) -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def step(model: nn.Module, joined: str, batch: dict[str, Tensor], **settings: Any) -> tuple[dict[str, Tensor], int]:
    units = chosen(joined, **settings)
    shake(model, techniques.apply_techniques(units, model, LANGUAGE, 0))
    techniques.begin_step(units, model, batch, 0.0)
    model.train()
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = LANGUAGE.compute_loss(model, batch)
        kept = meter.current_bytes
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, kept


def slow_scores(queries: Tensor, keys: Tensor) -> list[float]:
    """The readable twin for one text [heads, blocks, d]."""
    heads, blocks, _ = queries.shape
    scores = [0.0] * blocks
    for head in range(heads):
        for i in range(blocks):
            for j in range(i + 1):
                pair = max(0.0, float(queries[head, i] @ keys[head, j]))
                for one in {i, j}:
                    scores[one] += pair
    return scores


def test_scores_are_those_of_the_slow_twin() -> None:
    random = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 3, 5, 4, generator=random), torch.randn(2, 3, 5, 4, generator=random)
    found = score_blocks(queries, keys)
    for text in range(2):
        assert found[text].tolist() == pytest.approx(slow_scores(queries[text], keys[text]), rel=1e-5)


def slow_choice(model: Any, hidden: Tensor, fraction: float, mask: Tensor) -> list[list[int]]:
    """The kept positions of each text, one text and one group at a time."""
    block = model.model.layers[1]
    found = []
    for text, real in zip(hidden, mask, strict=True):
        whole = len(text) // SIZE
        means, empty = [], []
        for start in range(0, whole * SIZE, SIZE):
            inside = [text[at] for at in range(start, start + SIZE) if real[at]]
            empty.append(not inside)
            means.append(torch.stack(inside).mean(0) if inside else torch.zeros_like(text[0]))
        states = block.input_layernorm(torch.stack(means))
        queries = block.self_attn.q_proj(states).view(whole, 4, 4).transpose(0, 1)
        keys = block.self_attn.k_proj(states).view(whole, 2, 4).transpose(0, 1)
        scores = slow_scores(queries, keys[[0, 0, 1, 1]])
        ranked = sorted(range(whole), key=lambda one: (empty[one], -scores[one]))
        groups = sorted(ranked[: math.ceil(fraction * whole)])
        found.append([at for one in groups for at in range(one * SIZE, one * SIZE + SIZE)])
        found[-1].extend(range(whole * SIZE, len(text)))
    return found


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("length", [8, 22, 24])
def test_the_choice_is_that_of_the_slow_twin_with_padding_last(fraction: float, length: int) -> None:
    model = a_llama()
    hidden = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, 6:] = 0  # padding behind
    mask[1, :5] = 0  # padding before
    found = choose_tokens(model.model.layers[1], hidden, TokenChoice(fraction, SIZE, mask))
    with torch.no_grad():
        wanted = slow_choice(model, hidden, fraction, mask)
    if len(wanted[0]) == length:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == wanted


def blocks_as_they_should_run(model: Any, hidden: Tensor, kept: list[int]) -> Tensor:
    """A block on one text's kept tokens, by hand."""
    block = model.model.layers[1]
    positions = torch.tensor([kept])
    tables = model.model.rotary_emb(hidden, positions)
    mask = torch.full((len(kept), len(kept)), -torch.inf).triu(1)[None, None]
    out = block(hidden[:, kept], attention_mask=mask, position_embeddings=tables, position_ids=positions)
    result = hidden.clone()
    result[:, kept] = out[0] if isinstance(out, tuple) else out
    return result


def test_kept_tokens_see_kept_tokens_at_their_own_places_and_others_pass() -> None:
    model, plain = a_llama(), a_llama()
    units = chosen("token-drop+full", kept_fraction=0.5, group_size=SIZE, first_share=0.25)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    batch = a_batch(1)
    techniques.begin_step(units, model, batch, 0.0)
    seen: list[Tensor] = []
    for number in (1, 2):
        block = model.get_submodule(f"model.layers.{number}")
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.train()(**batch)
    with torch.no_grad():
        [kept] = slow_choice(plain, seen[0], 0.5, batch["attention_mask"])
        wanted = blocks_as_they_should_run(plain.train(), seen[0], kept)
    assert len(kept) < seen[0].shape[1]
    torch.testing.assert_close(seen[1], wanted, rtol=1e-5, atol=1e-6)


def test_all_tokens_kept_is_the_model_itself_and_fewer_are_not() -> None:
    batch = a_batch()
    wanted, plain = step(a_llama(), "full", batch)
    for settings in ({"kept_fraction": 1.0}, {"group_size": 12}, {"first_share": 1.0}):
        found, _ = step(a_llama(), "token-drop+full", batch, **{"group_size": SIZE, **settings})
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    found, kept = step(a_llama(), "token-drop+full", batch, group_size=SIZE, first_share=0.25)
    assert kept < plain
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], wanted["model.layers.0.mlp.up_proj.weight"])


def test_what_a_block_keeps_is_linear_in_the_tokens_that_pass_it() -> None:
    kept = {
        fraction: step(
            a_llama(3), "token-drop+full", a_batch(2, 64), kept_fraction=fraction, group_size=SIZE, first_share=0.34
        )[1]
        for fraction in (0.25, 0.5, 0.75)
    }
    assert kept[0.5] - kept[0.25] == pytest.approx(kept[0.75] - kept[0.5], rel=0.02)
    assert kept[0.5] > kept[0.25]


def test_later_tokens_do_not_change_earlier_ones_among_the_kept() -> None:
    """With the choice fixed. The choice itself may look ahead, as the card says."""
    model = a_llama()
    hidden = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    kept = [0, 1, 2, 3, 8, 9, 10, 11]
    with torch.no_grad():
        before = blocks_as_they_should_run(model, hidden, kept)
        hidden[:, 11] += 1
        after = blocks_as_they_should_run(model, hidden, kept)
    torch.testing.assert_close(after[:, :11], before[:, :11], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(after[:, 11], before[:, 11])


@pytest.mark.parametrize("joined", ["token-drop+gradient-checkpointing+full", "token-drop+lora", "token-drop+full"])
def test_beside_other_techniques_gradients_are_those_of_stored_activations(joined: str) -> None:
    settings = {"group_size": SIZE, "first_share": 0.25}
    plain, batch = joined.replace("gradient-checkpointing+", ""), a_batch()
    batch["attention_mask"][0, 15:] = 0
    batch["labels"][0, 15:] = -100
    (wanted, _), (found, _) = (step(a_llama(), one, batch, **settings) for one in (plain, joined))
    assert all(one.isfinite().all() for one in wanted.values())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_padding_is_read_from_the_mask_of_a_blocks_attention(kind: str) -> None:
    """A batch that the model is given in parts, or joined with another, is not the batch that the step begins with."""
    model, batch = a_llama(), a_batch()
    model.set_attn_implementation(kind)
    batch["attention_mask"][0, 15:] = 0
    batch["attention_mask"][1, 1:] = 0
    seen: list[Tensor | None] = []
    model.model.layers[1].register_forward_pre_hook(
        lambda _block, _args, given: seen.append(find_real_tokens(given["attention_mask"])), with_kwargs=True
    )
    model(**batch)
    assert seen[0] is not None
    assert torch.equal(seen[0], batch["attention_mask"].bool())
    model(**{**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert seen[1] is None or seen[1].all()
    halves = [{name: one[half : half + 1] for name, one in batch.items()} for half in range(3)]
    settings = {"group_size": SIZE, "first_share": 0.25}
    torch.manual_seed(0)
    whole = a_llama()
    units = chosen("token-drop+full", **settings)
    techniques.apply_techniques(units, whole, LANGUAGE, 0)
    techniques.begin_step(units, whole.train(), batch, 0.0)
    together = whole(**batch).logits
    for number, half in enumerate(halves):
        torch.testing.assert_close(whole(**half).logits[0], together[number], rtol=1e-4, atol=1e-5)


def test_scoring_uses_all_tokens_and_folding_leaves_nothing() -> None:
    model, plain, batch = a_llama(), a_llama(), a_batch()
    units = chosen("token-drop+full", group_size=SIZE, first_share=0.0)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    for technique in units:
        technique.merge_into_weights(model)
    assert not any("forward" in vars(one) for one in model.modules())


def test_models_of_another_kind_are_refused() -> None:
    for family in ("bert", "gpt2", "opt", "vit"):
        with pytest.raises(ModelError, match="has no blocks of Llama's kind; leave the technique token-drop out"):
            chosen("token-drop+full")[0].rewrite_model(FAMILIES[family].model(), FAMILIES[family].task, 0)
