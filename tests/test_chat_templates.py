"""Chat formats by name: what transformers renders from them."""

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from fedtune.offline_merge.chat_templates import CHAT_TEMPLATES
from tests.federations import tiny_bert

TURNS = [("system", "be good"), ("user", "hi"), ("assistant", "yes"), ("user", "why")]
RENDERED = {
    "chatml": (
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nbe good<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s> [INST] be good\n\nhi [/INST] yes</s> [INST] why [/INST]",
    "alpaca": "be good\n\n### Instruction:\nhi\n\n### Response:\nyes\n\n### Instruction:\nwhy\n\n### Response:\n",
    "exaone": "[|system|]be good[|endofturn|]\n[|user|]hi\n[|assistant|]yes[|endofturn|]\n[|user|]why\n[|assistant|]",
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    tiny_bert(tmp_path)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return loaded


def rendered(tokenizer: PreTrainedTokenizerFast, name: str, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    found = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_format_renders_a_conversation(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert rendered(tokenizer, name, TURNS) == RENDERED[name]


def test_formats_without_a_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    assert rendered(tokenizer, "mistral", TURNS[1:]) == "<s> [INST] hi [/INST] yes</s> [INST] why [/INST]"
    assert rendered(tokenizer, "exaone", TURNS[1:2]) == "[|system|][|endofturn|]\n[|user|]hi\n[|assistant|]"


def test_a_format_of_turns_refuses_two_in_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="take turns"):
        rendered(tokenizer, "mistral", [("user", "hi"), ("user", "hi?")])
