"""Chunked MLPs: the gradients of whole MLPs, and less kept for them, whatever the chunk."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.memory import StorageMeter
from tests.families import FAMILIES
from tests.technique_steps import LANGUAGE, TEXT, chosen
from tests.tiny import llama, texts


def step(model: PreTrainedModel, joined: str, batch: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    units = chosen(joined, **settings)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    model.train()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("size", [1, 5, 27, 100])
@pytest.mark.parametrize("others", ["full", "lora", "gradient-checkpointing+full", "selective-checkpointing+full"])
def test_gradients_are_those_of_whole_mlps(family: str, size: int, others: str) -> None:
    batch = FAMILIES[family].make_batch(rows=3, length=9)
    found = step(FAMILIES[family].model(), f"chunked-mlp+{others}", batch, chunk_size=size)
    wanted = step(FAMILIES[family].model(), others, batch)
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6)


def kept(joined: str, **settings: Any) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the peak of the step."""
    model = llama(intermediate_size=512, max_position_embeddings=64)
    units = chosen(joined, **settings)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    model.train()
    batch = texts(model, rows=4, length=64)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = model(**batch).loss
        held = meter.current_bytes
        loss.backward()
    return held, meter.peak_bytes


def test_activations_inside_the_mlps_are_not_kept() -> None:
    plain, chunked = kept("lora"), kept("chunked-mlp+lora", chunk_size=16)
    inside = 2 * 4 * 64 * 512 * 4  # one activation inside the MLP of each of two blocks
    assert plain[0] - chunked[0] > 2 * inside
    assert chunked[1] < 0.5 * plain[1]
    recomputed, both = (
        kept("gradient-checkpointing+lora"),
        kept("chunked-mlp+gradient-checkpointing+lora", chunk_size=16),
    )
    assert both[1] < 0.6 * recomputed[1]


def test_copies_and_pickled_models_run_their_own_layers() -> None:
    model = llama()
    units = chosen("chunked-mlp+full", chunk_size=3)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    batch = texts(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.train()(**batch).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    techniques.merge_into_weights(units, model)
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_what_has_no_such_mlps_is_refused() -> None:
    for family, task in (("opt", LANGUAGE), ("bert", TEXT)):
        with pytest.raises(ModelError, match="hold no MLP as a module of its own; remove chunked-mlp"):
            techniques.apply_techniques(chosen("chunked-mlp+full"), FAMILIES[family].model(), task, 0)
    with pytest.raises(RecipeError, match="densities are measured over all tokens"):
        chosen("chunked-mlp+deft+full")


def test_in_training_the_chunks_are_the_same_without_gradients() -> None:
    """meft runs its blocks both ways, and the bits of a product may depend on the number of its rows."""
    model = llama().train()
    rows: dict[bool, list[int]] = {True: [], False: []}
    techniques.apply_techniques(chosen("chunked-mlp+full", chunk_size=4), model, LANGUAGE, 0)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_pre_hook(lambda _, inputs: rows[torch.is_grad_enabled()].append(inputs[0].shape[0]))
    batch = texts(model, rows=2, length=7)
    with torch.no_grad():
        model(**batch)
    model(**batch)
    assert rows[False] == rows[True] == [4, 4, 4, 2]
