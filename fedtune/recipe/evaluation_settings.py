"""The settings of a recipe for evaluation: what is scored when, and the prompts that the global model answers."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["EvaluationSettings", "GenerationSettings", "Prompt", "PromptMessage"]


class PromptMessage(SettingsModel):
    """A message of a prompt, which the chat template writes."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


def _name_form(value: object) -> str:
    return "messages" if isinstance(value, list) else "text"


Prompt = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[list[PromptMessage], Field(min_length=1), Tag("messages")],
    Discriminator(_name_form),
]
"""A text, or a conversation that asks for a reply."""


class GenerationSettings(SettingsModel):
    """How text is generated. Without a temperature, the likeliest token is taken at each step."""

    max_new_tokens: int = Field(64, ge=1, le=4096, description="most tokens of a generated text")
    temperature: float = Field(
        0.0, ge=0, le=100, description="0: greedy; otherwise tokens are sampled from logits divided by this"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sampling considers the likeliest tokens that together have this probability"
    )

    @model_validator(mode="after")
    def _top_p_samples(self) -> Self:
        if self.top_p < 1 and not self.temperature:
            raise ValueError(
                "top_p is for sampling, but temperature is 0, which is greedy; set a temperature, e.g. 0.7"
            )
        return self


class EvaluationSettings(SettingsModel):
    """Evaluation settings. Validation runs every few rounds; the test split is evaluated once, at the end."""

    every_n_rounds: int = Field(1, ge=1)
    max_examples: int | None = Field(
        None,
        ge=1,
        description="validation examples evaluated before the last round, sampled with the seed; default: all",
    )
    batch_size: int = Field(64, ge=1)
    local_holdout: float = Field(
        0.0, ge=0, le=0.5, description="share of its examples that each client holds out for evaluation"
    )
    metrics: list[str] = Field(
        [],
        max_length=16,
        description="further metrics: f1, auc, balanced-accuracy of classes; exact_match, f1 of generated answers",
    )
    main_metric: str | None = Field(
        None, description="metric that is shown in tables and selects the best checkpoint; default: the task's"
    )
    clients: Literal["all"] | Annotated[int, Field(ge=1)] | None = Field(
        None, description="number of clients, or all, that evaluate results of rounds on their held-out data"
    )
    prompts: list[Prompt] = Field(
        [], max_length=64, description="texts or conversations that the model continues whenever it is scored"
    )
    generation: GenerationSettings = GenerationSettings()

    @model_validator(mode="after")
    def _clients_have_examples(self) -> Self:
        if self.clients is not None and not self.local_holdout:
            raise ValueError(
                "clients score on what they hold out, which is nothing; set local_holdout too, e.g. local_holdout: 0.2"
            )
        return self

    @model_validator(mode="after")
    def _prompts_ask(self) -> Self:
        for number, prompt in enumerate(self.prompts, 1):
            if not isinstance(prompt, str) and prompt[-1].role == "assistant":
                raise ValueError(f"prompt {number} ends in a message of the assistant; end it in one of the user")
        return self
