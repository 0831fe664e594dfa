"""Position interpolation: positions are squeezed by the factor, saved models carry it, others are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, PreTrainedModel

from fedtune import models
from fedtune.errors import ModelError
from fedtune.recipe.schema import ModelSettings
from tests.families import FAMILIES
from tests.technique_steps import LANGUAGE


def load(folder: Path, factor: float) -> Any:
    settings = ModelSettings(source=f"path:{folder}", position_interpolation=factor)
    return models.load_model(settings, LANGUAGE, (), seed=0).eval()


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_token_i_has_the_angles_of_position_i_over_the_factor(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", FAMILIES[family].model())
    plain, longer = load(folder, 1), load(folder, 4)
    ids = torch.arange(1, 12)[None]
    places = torch.arange(11)[None]
    mask = torch.ones_like(ids)  # without one, positions that leap would begin further texts
    far = longer(input_ids=ids, attention_mask=mask, position_ids=4 * places).logits
    assert torch.equal(far, plain(input_ids=ids).logits)
    assert not torch.allclose(longer(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)
    assert longer.config.max_position_embeddings == 4 * plain.config.max_position_embeddings


@torch.no_grad()
def test_a_factor_of_one_is_no_change_and_a_saved_model_carries_the_factor(tmp_path: Path) -> None:
    base = FAMILIES["llama"].model().eval()
    folder = saved(tmp_path / "base", base)
    ids = torch.arange(1, 12)[None]
    assert torch.equal(load(folder, 1)(input_ids=ids).logits, base(input_ids=ids).logits)
    longer = load(folder, 2.5)
    models.save_model(longer, (), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(input_ids=ids).logits, longer(input_ids=ids).logits)
    with pytest.raises(ModelError, match=r"already scales its positions \(linear\)"):
        load(tmp_path / "out", 2)


def test_models_without_rotary_positions_are_refused(tmp_path: Path) -> None:
    size: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        alibi = FalconForCausalLM(FalconConfig(alibi=True, pad_token_id=0, **size))
    for name, model in (("gpt2", FAMILIES["gpt2"].model()), ("falcon", alibi)):
        with pytest.raises(ModelError, match=r"has no rotary positions; set model\.position_interpolation to 1"):
            load(saved(tmp_path / name, model), 2)
    settings = ModelSettings(source="sample:logistic", position_interpolation=2)
    with pytest.raises(ModelError, match="sample:logistic has no rotary positions"):
        models.load_model(settings, FAMILIES["vit"].task, ("a", "b"), seed=0)
