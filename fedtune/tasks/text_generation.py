"""Text generation: predict the next token of a text.

What: the pretrained language model is trained on with its own head.
Columns: ``text-or-messages``: a text, or a conversation in one of four forms, told by the columns that the data have
or by ``format``: ``messages`` (a list of role and content; roles system, user, assistant, tool), ``prompt`` and
``completion`` (texts or messages), ``instruction``, ``output`` and perhaps ``input`` (Alpaca), ``conversations`` (from
and value: ShareGPT). ``tools`` may describe what a conversation calls. Data with the columns of two forms are refused
until ``format`` says which counts.
Texts: cut to ``train.max_length`` tokens; one that is not cut ends in the end token. Each token is a target.
Conversations: written by the model's chat template, or by ``chat_template``; an exported model carries that one.
Targets are what the assistant writes, with the sign that ends its turn (``loss_on: assistant``), its turns behind the
last message of a user (``completion``), or each token (``all``). Where the template marks the assistant's words by
``{% generation %}``, its marks count. Else each turn is found by rendering the conversation up to it and through it. A
turn that the template writes otherwise once another follows is no target, and a warning counts such turns. What follows
the last turn of the assistant is left out, unless each token is a target.
Cutting: a conversation longer than ``train.max_length`` loses its oldest exchanges, and keeps its system prompt. If the
last exchange alone is too long, its end is cut; if that left no target, its beginning is cut instead, the system prompt
with it. So no conversation is left out and each keeps a target. A warning counts those that are cut.
Loss: cross entropy of each target given the tokens before it, the mean over the targets of a batch. Padding does not
count.
Packing: with ``train.packing: best-fit`` several short texts share a row of ``train.max_length`` tokens in training.
Each is predicted as if it were alone. A longer text is split into pieces of that length, each predicted as a text of
its own; with ``train.long_texts: cut`` only its first piece is trained on. Conversations are cut as told above. Epochs
and steps count rows; a client weighs by the targets it trains on (``train.weigh_by: examples``: by its texts). A model
that cannot keep the texts of a row apart is refused. Scoring is not packed, and sees the first piece of a text.
Source of packing: Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830).
Metrics: perplexity (the main one; lower is better), loss in nats per target, and accuracy of the next token, all over
targets alone. ``evaluation.metrics: [exact_match, f1]`` also compares the last reply of each conversation with the one
that the model generates greedily for what stands before it, as SQuAD does.
Models: those of transformers' ``AutoModelForCausalLM``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.chat_formats import read_chat_template, set_chat_template
from fedtune.data.conversation_forms import ANY_FORM
from fedtune.data.encoded_conversations import (
    LossOn,
    encode_conversations,
    iter_conversation_tokens,
    iter_encoded_conversations,
)
from fedtune.data.encoded_prompts import (
    EncodedPrompts,
    encode_chat_prompts,
    encode_text_prompts,
    find_reply_end,
    split_last_reply,
)
from fedtune.data.encoded_texts import IGNORED_LABEL, encode_texts
from fedtune.data.token_blocks import iter_shuffled_tokens, iter_token_blocks, shuffle_rows
from fedtune.errors import RecipeError
from fedtune.models.end_tokens import save_end_tokens
from fedtune.recipe.evaluation_settings import Prompt
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_places
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TextGeneration"]

_LARGEST_EXPONENT = 700.0
"""exp of more overflows."""


class TextGeneration(TextTask):
    """Predict the next token."""

    name: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"

    format: Literal["auto", "text", "messages", "prompt-completion", "instruction", "conversations"] = Field(
        "auto", description="what the data are; by default as their columns say"
    )
    chat_template: str | None = Field(
        None, description="chatml, headings, plain, file:PATH.jinja or Jinja in full; by default the model's own"
    )
    loss_on: LossOn = Field("assistant", description="the targets in a conversation")

    @field_validator("chat_template")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("file:"):  # a file is read once, where the recipe is resolved
            read_chat_template(value)
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts or conversations."""
        return (ANY_FORM if self.format == "auto" else self.format,)

    @property
    def input_column(self) -> str:
        """The column of texts, unless only conversations are taken."""
        return "text" if self.format in ("auto", "text") else "messages"

    @property
    def main_metric(self) -> str:
        """Perplexity."""
        return "perplexity"

    @property
    def can_pack(self) -> bool:
        """Return True: every prediction is of one token of one text."""
        return True

    @property
    def compares_answers(self) -> bool:
        """Whether the targets of a conversation are replies."""
        return self.loss_on != "all"

    def require_answers(self, examples: Table) -> None:
        """Raise RecipeError for texts, which have no replies."""
        if "messages" not in examples.column_names:
            raise RecipeError(
                "evaluation.metrics: exact_match and f1 compare replies, but the data are read as texts; drop the "
                "metrics, or name the format of the conversations"
            )

    def encode_prompts(self, prompts: Sequence[Prompt], examples: Table, recipe: Recipe, reader: Any) -> EncodedPrompts:
        """Texts to continue; conversations, and texts where the data are conversations, as the template writes them."""
        chat = "messages" in examples.column_names
        asked = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) and chat else prompt for prompt in prompts
        ]
        found = [
            encode_text_prompts(reader, [one])
            if isinstance(one, str)
            else encode_chat_prompts(reader, [[dict(message) for message in one]])
            for one in asked
        ]
        rows, stops = [row for one in found for row in one.rows], frozenset(end for one in found for end in one.stops)
        return EncodedPrompts(rows, stops)

    def split_answers(self, batch: Mapping[str, Tensor], reader: Any) -> tuple[EncodedPrompts, list[str]]:
        """What stands before the last reply, and that reply."""
        rows = zip(batch["input_ids"], batch["labels"], strict=True)
        pairs = [split_last_reply(ids, labels) for ids, labels in rows]
        answers = reader.batch_decode([answer for _, answer in pairs], skip_special_tokens=True)
        return EncodedPrompts([prompt for prompt, _ in pairs], find_reply_end(reader)), list(answers)

    def count_predictions(self, labels: Tensor) -> int:
        """Tokens that are predicted from those before them; labels [n, tokens]."""
        return int((labels[:, 1:] != IGNORED_LABEL).sum())

    def load_reader(self, recipe: Recipe) -> Any:
        """The model's tokenizer, with the chat template that is wanted."""
        tokenizer = super().load_reader(recipe)
        if self.chat_template is not None:
            set_chat_template(tokenizer, self.chat_template)
        return tokenizer

    @property
    def changes_reader(self) -> bool:
        """Whether the tokenizer gets a chat template."""
        return self.chat_template is not None

    def save_model_extras(self, model: nn.Module, recipe: Recipe, folder: Path) -> None:
        """Name the sign that ends a reply as an end token, so that generation stops behind it."""
        reader = self.load_reader(recipe)
        if reader.chat_template and reader.is_fast and (ends := find_reply_end(reader)):
            save_end_tokens(model, ends, folder)

    def read_files(self) -> Self:
        """With the text of a template's file."""
        if self.chat_template is None or not self.chat_template.startswith("file:"):
            return self
        return self.model_copy(update={"chat_template": read_chat_template(self.chat_template)})

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids, which are the labels too; in a conversation those of targets alone."""
        if "messages" in examples.column_names:
            return encode_conversations(examples, reader, recipe.train.max_length, self.loss_on)
        if self.chat_template is not None or self.loss_on != "assistant":
            raise RecipeError(
                f"task, {self.name}: chat_template and loss_on are for conversations, but {recipe.data.title} is read "
                "as texts; leave them out, or name the format of the conversations"
            )
        splits = recipe.train.long_texts == "split"
        return encode_texts(examples, reader, recipe.train.max_length, splits=splits)

    def iter_encoded(self, examples: Table, recipe: Recipe, reader: Any, size: int) -> Iterator[EncodedDataset]:
        """``size`` texts or conversations at a time; the warnings of conversations count those of all."""
        if "messages" not in examples.column_names:
            return super().iter_encoded(examples, recipe, reader, size)
        return iter_encoded_conversations(examples, reader, recipe.train.max_length, self.loss_on, size)

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each token but the first; logits [n, tokens, vocabulary], labels [n, tokens]."""
        return score_places(logits[:, :-1], labels[:, 1:])

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Perplexity beside accuracy and loss."""
        return super().compute_metrics(sums) | {"perplexity": math.exp(min(sums.mean_loss, _LARGEST_EXPONENT))}

    def iter_calibration_inputs(self, examples: Table, recipe: Recipe, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Texts or conversations end to end in blocks of ``train.max_length`` tokens, as the authors of AIM do it.

        The blocks come from the first 256 of a shuffled order that are at most a block long.
        """
        reader = self.load_reader(recipe)
        if "messages" in examples.column_names:
            rows = iter_conversation_tokens(examples, reader, shuffle_rows(len(examples)))
        else:
            rows = iter_shuffled_tokens(examples["text"], reader)
        return iter_token_blocks(rows, block_size=recipe.train.max_length, batch=batch_size)

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens."""
        ids = draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
