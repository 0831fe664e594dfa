"""The names of the columns of a data source."""

from typing import Literal

from pydantic import Field

from fedtune.recipe.settings_model import SettingsModel

__all__ = ["ColumnSettings"]


class ColumnSettings(SettingsModel):
    """The names of the source's columns."""

    text: str = "text"
    image: str = "image"
    text_pair: str = Field("text_pair", description="second text of a pair")
    label: str = Field("label", description="a class, several classes or a number, depending on the task")
    target: str = Field("target", description="text to generate")
    prompt: str = Field("prompt", description="text or messages to reply to")
    chosen: str = Field("chosen", description="preferred completion")
    rejected: str = Field("rejected", description="completion that is not preferred")
    words: str = Field("words", description="list of words")
    tags: str = Field("tags", description="list with one tag per word")
    messages: str = Field("messages", description="conversation: list of role and content")
    completion: str = Field("completion", description="text or messages that reply to the prompt")
    instruction: str = Field("instruction", description="instruction that output replies to")
    input: str = Field("input", description="what the instruction is about")
    output: str = Field("output", description="reply to the instruction")
    conversations: str = Field("conversations", description="conversation in ShareGPT's form: list of from and value")
    tools: str = Field("tools", description="descriptions of the tools that a conversation may call")
    group: str | None = Field(None, description="examples of the same group are kept together")
    domain: str | None = Field(None, description="results are also reported per domain")
    split: str | Literal[False] | None = Field(
        None, description="split of each row: train, validation or test; default: a column called split; false: none"
    )
