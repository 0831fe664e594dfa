"""Text that a model generates for prompts, in batches that give what each prompt gives alone."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.data import EncodedDataset
from fedtune.data.encoded_prompts import EncodedPrompts
from fedtune.errors import ModelError
from fedtune.recipe.evaluation_settings import GenerationSettings
from fedtune.techniques import Technique, begin_step

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["GeneratedText", "TextGenerator", "require_answer_room", "require_positions"]

_OF_THE_MODEL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What a model's own generation settings say about its tokens. Its other settings, such as a temperature or a
repetition penalty, do not count."""


class GeneratedText(NamedTuple):
    """A text without special tokens, and whether the model ended it itself."""

    text: str
    ended: bool


@dataclass(frozen=True)
class TextGenerator:
    """A model with its techniques and tokenizer, and the settings of the texts that it generates."""

    model: nn.Module
    techniques: Sequence[Technique]
    tokenizer: Any
    settings: GenerationSettings
    batch_size: int

    @torch.no_grad()
    def generate_texts(self, prompts: EncodedPrompts, seeds: Sequence[int] = ()) -> list[GeneratedText]:
        """Return a text for each prompt. Sampling needs a seed for each; the same seed gives the same text."""
        self.model.eval()
        begin_step(self.techniques, self.model, {}, 1.0)
        stops = prompts.stops | _list_end_tokens(self.model, self.tokenizer)
        found: dict[int, GeneratedText] = {}
        for chosen in _make_batches(self.model, prompts.rows, self.batch_size):
            rows = [prompts.rows[place] for place in chosen]
            written = self._write(rows, stops, [seeds[place] for place in chosen] if seeds else [])
            found |= {place: self._decode(row, stops) for place, row in zip(chosen, written, strict=True)}
        return [found[place] for place in range(len(prompts.rows))]

    def _write(self, rows: Sequence[Sequence[int]], stops: frozenset[int], seeds: Sequence[int]) -> list[list[int]]:
        """The new tokens of each row."""
        from fedtune.training.token_sampling import make_sampler

        model: Any = self.model
        ids, mask = _pad(rows, int(self.tokenizer.pad_token_id), on_left=not model.config.is_encoder_decoder)
        sampler = make_sampler(self.settings, seeds)
        inputs = move_tensors({"input_ids": ids, "attention_mask": mask}, find_device(model))
        with _use_generation_config(model, self._make_config(stops)) as config:
            out = model.generate(**inputs, generation_config=config, logits_processor=sampler)
        before = 1 if model.config.is_encoder_decoder else ids.shape[1]
        new: list[list[int]] = out[:, before:].tolist()
        return new

    def _make_config(self, stops: frozenset[int]) -> "GenerationConfig":
        from transformers import GenerationConfig  # images are classified without it

        model: Any = self.model
        own = {name: getattr(model.generation_config, name, None) for name in _OF_THE_MODEL}
        return GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=_has_cache(model) and all(technique.allows_kv_cache for technique in self.techniques),
            eos_token_id=sorted(stops),
            pad_token_id=self.tokenizer.pad_token_id,
            **own,
        )

    def _decode(self, tokens: Sequence[int], stops: frozenset[int]) -> GeneratedText:
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        return GeneratedText(self.tokenizer.decode(tokens[:end], skip_special_tokens=True), end is not None)


def require_positions(model: nn.Module, prompts: EncodedPrompts, settings: GenerationSettings) -> None:
    """Raise ModelError for a prompt without tokens, or one that leaves no room for the tokens to generate."""
    for number, row in enumerate(prompts.rows, 1):
        if not row:
            raise ModelError(f"evaluation.prompts: prompt {number} has no tokens; write some text")
        _require_room(model, len(row), settings, f"evaluation.prompts: prompt {number}")


def require_answer_room(model: nn.Module, examples: Sequence[EncodedDataset], settings: GenerationSettings) -> None:
    """Raise ModelError if an answer to an example might not fit behind it."""
    lengths = [int(one.lengths.max()) for one in examples if len(one) and one.lengths is not None]
    _require_room(model, max(lengths, default=0), settings, "evaluation.metrics: an example")


def _require_room(model: Any, length: int, settings: GenerationSettings, what: str) -> None:
    new = 0 if model.config.is_encoder_decoder else settings.max_new_tokens
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and length + new > longest:
        raise ModelError(
            f"{what} has {length} tokens and evaluation.generation.max_new_tokens is {settings.max_new_tokens}, but "
            f"the model reads at most {longest}; shorten one"
        )


def _list_end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return frozenset(int(token) for token in (*named, tokenizer.eos_token_id) if token is not None)


def _make_batches(model: nn.Module, rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Places of rows of similar length. A model that cannot be told positions gets rows of equal length, unpadded."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    padded = _takes_padding(model)
    for _, group in groupby(order, key=lambda place: 0 if padded else len(rows[place])):
        places = list(group)
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _has_cache(model: Any) -> bool:
    """Whether the model keeps a cache of transformers. RWKV has a state of its own, with which it writes otherwise."""
    names = inspect.signature(model.forward).parameters
    return any(name in names for name in ("cache", "cache_params", "past_key_values"))


def _takes_padding(model: Any) -> bool:
    """Whether padding changes nothing: an encoder masks it, a decoder is told the positions behind it."""
    return bool(model.config.is_encoder_decoder) or "position_ids" in inspect.signature(model.forward).parameters


def _pad(rows: Sequence[Sequence[int]], fill: int, *, on_left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [rows, longest]. A decoder continues at the right end, so its padding is on the
    left.
    """
    longest = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        span = slice(longest - len(row), longest) if on_left else slice(len(row))
        ids[place, span], mask[place, span] = torch.tensor(row), 1
    return ids, mask


@contextmanager
def _use_generation_config(model: Any, config: "GenerationConfig") -> Iterator["GenerationConfig"]:
    """Replace the model's own settings, which transformers would take for all that ``config`` leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = own
