"""Generated text equals transformers' own, whatever the batch, the techniques and the model's generation settings."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.data.encoded_prompts import EncodedPrompts
from fedtune.recipe.evaluation_settings import GenerationSettings
from fedtune.techniques import apply_techniques, merge_into_weights
from fedtune.training.generation import TextGenerator
from tests.meft_models import FAMILIES, made
from tests.technique_steps import LANGUAGE, chosen, shake
from tests.tiny import VOCABULARY, llama

DECODERS = [name for name, (_, task) in FAMILIES.items() if task == LANGUAGE]
NEW = 12


class Numbers:
    """A tokenizer whose words are the numbers of tokens. The end token pads, as in many published models."""

    pad_token_id = eos_token_id = 0

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def generator(model: torch.nn.Module, techniques: Any = (), size: int = 8, **settings: Any) -> TextGenerator:
    return TextGenerator(model, techniques, Numbers(), GenerationSettings(max_new_tokens=NEW, **settings), size)


def prompts(*lengths: int) -> EncodedPrompts:
    random = torch.Generator().manual_seed(3)
    return EncodedPrompts([torch.randint(1, VOCABULARY, (n,), generator=random).tolist() for n in lengths])


LENGTHS = (1, 3, 9, 9, 17, 2)


def greedy(model: Any, row: list[int], new: int = NEW, ends: Collection[int] = (0,)) -> list[int]:
    """One token after the other, by whole forward passes without a cache or padding."""
    ids = list(row)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(row) :]


def as_text(tokens: list[int]) -> tuple[str, bool]:
    return " ".join(str(token) for token in tokens if token), 0 in tokens


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_gives_what_each_prompt_gives_alone(family: str) -> None:
    model, _ = made(family)
    asked = prompts(*LENGTHS)
    found = generator(model).generate_texts(asked)
    assert found == [as_text(greedy(model, row)) for row in asked.rows]
    assert found == generator(model, size=1).generate_texts(asked)
    assert len({one.text for one in found}) > 2


TECHNIQUES = [
    *("full", "lora", "bias", "lora+gradient-checkpointing", "lora+selective-checkpointing", "lora+chunked-mlp"),
    *("lora+fused-cross-entropy", "lora+error-norm-truncation", "lora+shifted-attention", "lora+deft", "meft"),
    *("meft+fused-cross-entropy", "lora+meft", "dynamic-pruning"),
]


@pytest.mark.parametrize("joined", TECHNIQUES)
def test_a_model_in_training_writes_what_its_export_writes(joined: str, tmp_path: Path) -> None:
    model, task = made("gpt2" if joined == "bias" else "llama")
    techniques = chosen(joined)
    shake(model, apply_techniques(techniques, model, task, 0))
    asked = prompts(*LENGTHS)
    found = generator(model, techniques).generate_texts(asked)
    merge_into_weights(techniques, model)
    model.config.use_cache = True
    model.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for row, one in zip(asked.rows, found, strict=True):
        ids = torch.tensor([row])
        written = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
        assert one == as_text(written[0, len(row) :].tolist())


def test_settings_of_the_model_do_not_change_greedy_text() -> None:
    """Instruction-tuned models come with sampling settings and penalties, which transformers applies by default."""
    model = llama()
    asked = prompts(*LENGTHS)
    plain = generator(model).generate_texts(asked)
    own = model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty = True, 5.0, 3, 0.5, 3.0
    own.no_repeat_ngram_size, own.min_new_tokens, own.max_length = 1, 12, 500
    before = own.to_dict()
    assert generator(model).generate_texts(asked) == plain
    assert model.generation_config is own
    assert own.to_dict() == before


def test_a_model_without_positions_is_given_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches hold prompts of one length each."""
    model = llama()
    seen: list[torch.Tensor] = []
    plain = model.generate

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["attention_mask"])
        return plain(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    wanted = generator(model).generate_texts(prompts(*LENGTHS))
    assert [len(mask) for mask in seen] == [6]
    seen.clear()
    forward = type(model).forward

    def without_positions(self: Any, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **others)

    monkeypatch.setattr(type(model), "forward", without_positions)
    assert generator(model).generate_texts(prompts(*LENGTHS)) == wanted
    assert [len(mask) for mask in seen] == [1, 1, 1, 2, 1]
    assert all(bool(mask.all()) for mask in seen)


def test_sampling_repeats_and_does_not_depend_on_the_batch() -> None:
    model = llama(initializer_range=0.3)
    asked, seeds = prompts(*LENGTHS), range(6)
    found = generator(model, temperature=1.5, top_p=0.9).generate_texts(asked, seeds)
    assert found == generator(model, size=1, temperature=1.5, top_p=0.9).generate_texts(asked, seeds)
    assert found != generator(model, temperature=1.5, top_p=0.9).generate_texts(asked, range(1, 7))
    assert found != generator(model).generate_texts(asked)
    cold = generator(model, temperature=1e-6).generate_texts(asked, seeds)
    assert cold == generator(model).generate_texts(asked)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_samples_have_the_probabilities_of_the_warped_softmax(top_p: float) -> None:
    """20,000 first tokens against probabilities that are computed by hand."""
    from fedtune.training.token_sampling import make_sampler

    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    scores = (logits.double() / 0.8).softmax(0)
    order = scores.argsort(descending=True)
    kept = [int(token) for place, token in enumerate(order) if float(scores[order[:place]].sum()) < top_p]
    wanted = torch.zeros(6, dtype=torch.float64)
    wanted[kept] = scores[kept] / scores[kept].sum()
    count, no_ids = 20_000, torch.LongTensor(20_000, 1)
    sampler = make_sampler(GenerationSettings(temperature=0.8, top_p=top_p), range(count))
    drawn = Counter(sampler(no_ids, logits.repeat(count, 1)).argmax(-1).tolist())
    found = torch.tensor([drawn[token] / count for token in range(6)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * (0.25 / count) ** 0.5)
    assert all((found[token] == 0) == (wanted[token] == 0) for token in range(5))
