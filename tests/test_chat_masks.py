"""Which tokens of a conversation are targets, against a slow twin and templates in two forms."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedtune.data.chat_formats import CHAT_FORMATS
from fedtune.data.encoded_conversations import LossOn, encode_conversations
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.errors import DataError, FedtuneWarning, ModelError
from tests.chat_examples import TEMPLATES, chat_table, chat_tokenizer, make_conversations, mask_slowly

Conversation = list[dict[str, Any]]
THINKING = (
    "{% for one in messages %}{{ '<|im_start|>' + one.role + '\n' }}"
    "{% if one.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ one.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLING = (
    "{% for tool in tools or [] %}{{ tool.name + '\n' }}{% endfor %}{% for one in messages %}"
    "{{ '<|im_start|>' + one.role + '\n' + one.content }}{% for call in one.tool_calls or [] %}"
    "{{ call.function.name + '(' + call.function.arguments | tojson + ')' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def talk(*contents: str, system: str = "") -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    said = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encode(
    template: str, conversations: list[Conversation], loss_on: LossOn = "assistant", length: int = 9999, **columns: Any
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and targets of each conversation."""
    encoded = encode_conversations(chat_table(conversations, **columns), with_template(template), length, loss_on)
    assert len(encoded) == len(conversations)
    found = []
    for row in range(len(encoded)):
        batch = encoded.make_batch([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
        found.append((ids, [label != IGNORED_LABEL for label in labels]))
    return found


def targets(template: str, conversation: Conversation, loss_on: LossOn = "assistant", **columns: Any) -> str:
    """The text of all targets, with a bar between those that are apart."""
    [(ids, mask)] = encode(template, [conversation], loss_on, **columns)
    runs = [""] * (len(ids) + 1)
    for place, (token, target) in enumerate(zip(ids, mask, strict=True)):
        runs[place] = str(chat_tokenizer().convert_ids_to_tokens(token)) if target else " "
    return " | ".join("".join(runs).split())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("marked", [False, True])
def test_targets_are_those_of_a_slow_twin(name: str, marked: bool) -> None:
    """With marks and without: so the two ways to find them agree with each other too."""
    template, conversations = TEMPLATES[name], make_conversations(150)
    found = encode(template.marked if marked else template.plain, conversations)
    for conversation, one in zip(conversations, found, strict=True):
        assert one == mask_slowly(template.write(conversation), chat_tokenizer()), conversation


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_named_formats_teach_the_reply_and_its_end(name: str) -> None:
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert targets(CHAT_FORMATS[name], talk("hello", "fine", "how", "a", system="be")) == f"fine{end} | a{end}"


def test_completion_is_what_follows_the_last_user() -> None:
    conversation = talk("hello", "fine", "how", "a")
    for template in (TEMPLATES["chatml"].plain, TEMPLATES["chatml"].marked):
        assert targets(template, conversation, "completion") == "a<|im_end|>"
    [(_, everything)] = encode(TEMPLATES["chatml"].plain, [conversation], "all")
    assert all(everything)


def test_what_nobody_replies_to_is_left_out() -> None:
    short, longer = talk("hello", "fine"), talk("hello", "fine", "bye")
    template = TEMPLATES["chatml"].plain
    assert encode(template, [longer]) == encode(template, [short])
    assert encode(template, [longer], "all") != encode(template, [short], "all")


def test_tool_calls_are_targets_and_their_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation: Conversation = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "fine"},
    ]
    found = targets(CALLING, conversation, tools=[[{"name": "add"}]])
    assert found.replace("Ġ", "") == 'add({"a":1})<|im_end|> | fine<|im_end|>'
    assert targets(CALLING, conversation, "completion", tools=[[{"name": "add"}]]) == found


def test_a_turn_that_is_written_otherwise_later_is_left_out_and_counted() -> None:
    conversation = talk("hello", "fine", "how", "a")
    with pytest.warns(FedtuneWarning, match="^1 of 2 replies are not trained on"):
        assert targets(THINKING, conversation) == "<think></think>a<|im_end|>"


def test_a_turn_with_nothing_before_it_is_left_out_where_the_template_needs_something() -> None:
    template = "{{ messages[0].role }}" + TEMPLATES["chatml"].plain
    with pytest.warns(FedtuneWarning, match="^1 of 2 replies"):
        assert targets(template, [*talk("", "hello")[1:], *talk("how", "a")]) == "a<|im_end|>"


def test_a_template_that_asks_otherwise_than_it_writes_is_refused() -> None:
    template = TEMPLATES["chatml"].plain.replace("assistant\n' }}", "assistant\n<think>' }}")
    with pytest.raises(DataError, match="writes the reply of the conversation that begins with 'hello' otherwise"):
        encode(template, [talk("hello", "fine")])


def test_a_reply_that_never_ends_is_warned_of() -> None:
    for template in (
        "{% for one in messages %}{{ '[' + one.role + ']' + one.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        TEMPLATES["chatml"].marked.replace("+ '<|im_end|>' }}{% endg", "}}{% endg"),
    ):
        with pytest.warns(FedtuneWarning, match="does not learn to stop"):
            assert targets(template, talk("hello", "fine")) == "fine"


def test_white_space_that_alone_ends_a_reply_is_a_target() -> None:
    template = "{% for one in messages %}{{ one.content + '\n' }}{% endfor %}"
    assert targets(template, talk("hello", "fine")) == "fineĊ"


def test_a_reply_without_a_target_is_refused() -> None:
    marks = "{% for one in messages %}{% generation %}{% endgeneration %}{{ one.content }}{% endfor %}"
    # Before transformers 5.24, the template itself fails where it marks nothing.
    sentence = r"the (assistant writes nothing in|chat template cannot write) the conversation that begins with 'hello'"
    with pytest.raises(DataError, match=sentence):
        encode(marks, [talk("hello", "fine")])


@pytest.mark.parametrize(
    ("template", "problem", "error"),
    [
        ("{% for %}", "the chat template is no valid Jinja", ModelError),
        ("{{ raise_exception('System role not supported') }}", "begins with 'hello': System role not su", DataError),
        ("{{ messages[0].content + 1 }}", "the chat template cannot write the conversation", DataError),
        ("", r"the tokenizer has no chat template, .* \{chat_template: chatml\}", ModelError),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, problem: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=problem):
        encode(template, [talk("hello", "fine")])
