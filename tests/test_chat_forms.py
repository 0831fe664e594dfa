"""Conversations in each form that people keep them in, and what of bad input is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, GenerationConfig

from fedtune import tasks
from fedtune.cli.data import data as command
from fedtune.cli.main import main
from fedtune.data import Table
from fedtune.data.chat_formats import CHAT_FORMATS
from fedtune.errors import DataError, ModelError, RecipeError
from fedtune.export import export_model
from fedtune.recipe.schema import Recipe
from fedtune.training.calibration_inputs import load_calibration_inputs
from tests.chat_examples import TEMPLATES
from tests.task_cases import task_recipe

CASE = "text-generation, messages"
SAID = [{"role": "user", "content": "red\n\ncat"}, {"role": "assistant", "content": "runs"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": SAID},
    "prompt-completion": {"prompt": "red\n\ncat", "completion": "runs"},
    "prompt-completion of messages": {"prompt": SAID[:1], "completion": SAID[1:]},
    "instruction": {"instruction": "red", "input": "cat", "output": "runs"},
    "instruction alone": {"instruction": "red\n\ncat", "input": "", "output": "runs"},
    "conversations": {"conversations": [{"from": "human", "value": "red\n\ncat"}, {"from": "gpt", "value": "runs"}]},
}


def write(folder: Path, *rows: Any) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load(folder: Path, *rows: Any, overrides: tuple[str, ...] = ()) -> Table:
    """All rows, as the recipe of the settings table reads them."""
    recipe = task_recipe(CASE, folder, *overrides)
    write(folder, *rows)
    return tasks.load_all_examples(recipe, ())


@pytest.mark.parametrize("name", ROWS)
def test_each_form_is_told_by_its_columns(name: str, home: Path, tmp_path: Path) -> None:
    found = load(tmp_path, *[ROWS[name]] * 3)
    assert found["messages"] == [SAID] * 3
    assert found["tools"] == [None] * 3
    named = f"task={{text-generation: {{chat_template: chatml, format: {name.split()[0]}}}}}"
    assert load(tmp_path, *[ROWS[name]] * 3, overrides=(named,))["messages"] == [SAID] * 3


def test_texts_are_read_as_before(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-generation", tmp_path, rows=20)
    reader = tasks.load_reader(recipe)
    for chosen in ("text-generation", "{text-generation: {format: text}}"):
        task = tasks.get_task(task_recipe("text-generation", tmp_path, f"task={chosen}", rows=20).task)
        examples = tasks.load_all_examples(recipe, ())
        batch = task.encode_examples(examples, recipe, reader).make_batch(range(20))
        mask = batch["attention_mask"].bool()
        expected = [[*reader(text)["input_ids"], reader.eos_token_id][:16] for text in examples["text"]]
        rows = zip(batch["input_ids"], mask, strict=True)
        assert [ids[tokens].tolist() for ids, tokens in rows] == expected
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~mask, -100))


def test_a_column_may_be_called_otherwise(home: Path, tmp_path: Path) -> None:
    row = {"chat": SAID, "prompt": "a", "completion": "b"}
    assert load(tmp_path, row, overrides=("data.columns.messages=chat",))["messages"] == [SAID]


def test_columns_of_two_forms_are_refused_until_one_is_named(home: Path, tmp_path: Path) -> None:
    row = {"text": "red cat", "prompt": "red", "completion": "cat"}
    with pytest.raises(DataError, match=r"has columns for text and prompt-completion; say which to train on"):
        load(tmp_path, row)
    chosen = "task={text-generation: {format: text}}"
    assert load(tmp_path, row, overrides=(chosen,))["text"] == ["red cat"]


def test_tools_and_their_calls_are_read_where_rows_differ(home: Path, tmp_path: Path) -> None:
    """A table fills up what rows lack, and keeps as JSON what differs in type; arguments may be JSON by themselves."""

    def row(arguments: Any, tools: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        said = [SAID[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        return {"messages": [*said, SAID[1]], "tools": tools}

    tools = [{"name": "add", "parameters": {"a": "int"}}]
    found = load(tmp_path, row({"a": 1}, tools), row('{"a": 1}', json.dumps(tools)), row({"b": "x"}, None))
    calls = [messages[1]["tool_calls"][0]["function"] for messages in found["messages"]]
    assert [call["arguments"] for call in calls] == [{"a": 1}, {"a": 1}, {"b": "x"}]
    assert found["tools"] == [tools, tools, None]
    assert [message.keys() for message in found["messages"][0]] == [
        {"role", "content"},
        {"role", "content", "tool_calls"},
        {"role", "content"},
        {"role", "content"},
    ]


BAD = {
    "row 2 has no value in column 'messages'": {"messages": None},
    "row 2 has no list of messages": {"messages": []},
    "row 2 has a message without a role": {"messages": [{"content": "a"}]},
    "row 2 has a message of role 'robot'; the roles are system": {
        "messages": [*SAID, {"role": "robot", "content": "a"}]
    },
    "row 2 has no assistant's message": {"messages": SAID[:1]},
    "row 2 has a message with a content that is no text but a list": {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, SAID[1]]
    },
    "row 2 has a message with no content": {"messages": [{"role": "user", "content": None}, SAID[1]]},
    "row 2 has messages with from and value; set the task's format": {
        "messages": ROWS["conversations"]["conversations"]
    },
    "row 2 has a tool call without a name": {"messages": [{**SAID[1], "tool_calls": [{"id": "1"}]}]},
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_row_is_named(sentence: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load(tmp_path, ROWS["messages"], BAD[sentence])
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "a", "completion": SAID[1:]}, "row 1 has a text beside messages in prompt and completion"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "row 1 has a message of role 'narrator'"),
        ({"conversations": SAID}, "row 1 has messages with role and content; set the task's format to messages"),
        ({"instruction": "a", "output": None}, "row 1 has no value in column 'output'"),
        ({"prompt": "a"}, "has no column 'text', which data.columns.text names"),
    ],
)
def test_a_bad_row_of_another_form_is_named(row: Any, sentence: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        load(tmp_path, row)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ("chat_template: chatlm", RecipeError, "chat_template: 'chatlm' is none of chatml, headings, plain, nor file:"),
        ("chat_template: 'file:/nowhere.jinja'", RecipeError, "chat_template: cannot read /nowhere.jinja; check"),
        ("chat_template: 'file:/etc/hosts'", RecipeError, "chat_template: /etc/hosts is no template; name a file"),
        ("format: text", DataError, "has no column 'text'"),
        ("format: conversations", DataError, "has no column 'conversations', which data.columns.conversations names"),
        ("loss_on: user", RecipeError, "loss_on"),
        ("format: auto", ModelError, "the tokenizer has no chat template"),
    ],
)
def test_bad_settings_are_refused(
    settings: str, error: type[Exception], sentence: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        encode(task_recipe(CASE, tmp_path, f"task={{text-generation: {{{settings}}}}}", rows=20))
    assert sentence in str(refused.value)


def encode(recipe: Recipe) -> None:
    tasks.encode_examples(tasks.load_all_examples(recipe, ()), recipe, tasks.load_reader(recipe))


def test_settings_of_conversations_are_refused_for_texts(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-generation", tmp_path, "task={text-generation: {loss_on: all}}", rows=20)
    with pytest.raises(RecipeError, match="chat_template and loss_on are for conversations, but jsonl:"):
        encode(recipe)


def test_a_template_file_travels_in_the_recipe_and_with_the_model(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATES["chatml"].plain, encoding="utf-8")
    chosen = f"task={{text-generation: {{chat_template: 'file:{file}'}}}}"
    recipe = task_recipe(CASE, tmp_path, chosen, rows=60)
    assert recipe.task.settings["chat_template"] == TEMPLATES["chatml"].plain
    file.unlink()
    encode(recipe)
    export_model(recipe, {}, tmp_path / "out", None, "card\n")
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATES["chatml"].plain


def test_an_exported_model_stops_behind_a_reply(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(CASE, tmp_path, "train.techniques=lora", rows=60)
    for form in ("model", "adapter"):
        export_model(recipe, {}, tmp_path / f"as-{form}", form, "card\n")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"as-{form}")
        assert tokenizer.chat_template == CHAT_FORMATS["chatml"]  # the base has none
    ends = GenerationConfig.from_pretrained(tmp_path / "as-model").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    assert set(ends) - {tokenizer.convert_tokens_to_ids("<|im_end|>")} <= {tokenizer.eos_token_id, 2}


def test_conversations_calibrate_as_they_are_rendered(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(CASE, tmp_path, rows=40)
    task, reader = tasks.get_task(recipe.task), tasks.load_reader(recipe)
    found = load_calibration_inputs(f"jsonl:{tmp_path}/data.jsonl", recipe.model, task, block=16)
    ids = [token for batch in found for row in batch["input_ids"].tolist() for token in row]
    rendered = [reader.apply_chat_template(one)["input_ids"] for one in tasks.load_all_examples(recipe, ())["messages"]]
    assert len(ids) == sum(len(one) for one in rendered if len(one) <= 16) // 16 * 16
    assert any(one == ids[: len(one)] for one in rendered)


def test_show_prints_examples_with_their_targets(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe(CASE, tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    arguments = ["show", str(tmp_path / "recipe.yaml"), "--examples", "2"]
    shown = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    reader, messages = tasks.load_reader(recipe), tasks.load_data(recipe).train["messages"][:2]
    for segments, said in zip(json.loads(shown.stdout)["examples"], messages, strict=True):
        replies = [f"{one['content']} <|im_end|>" for one in said if one["role"] == "assistant"]
        assert [one["text"] for one in segments if one["target"]] == replies
        assert " ".join(one["text"] for one in segments) == reader.decode(reader.apply_chat_template(said)["input_ids"])
    printed = CliRunner().invoke(command, arguments, catch_exceptions=False).output
    assert all(f"[[{one['content']} <|im_end|>]]" in printed for said in messages for one in said[1::2])


def test_show_prints_the_label_of_a_text(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("text-classification", tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    arguments = ["show", str(tmp_path / "recipe.yaml"), "--examples", "1", "--json"]
    [[text, label]] = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)["examples"]
    assert label == {"text": tasks.load_data(recipe).train["text"][0].split()[0], "target": True}
    assert label["text"] in text["text"]
    assert not text["target"]


def test_show_prints_both_completions_of_a_preference(home: Path, tmp_path: Path) -> None:
    recipe = task_recipe("preference", tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    arguments = ["show", str(tmp_path / "recipe.yaml"), "--examples", "1", "--json"]
    [parts] = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)["examples"]
    assert [one["text"] for one in parts if one["target"]] == ["runs to rome [SEP]", "sits in oslo [SEP]"]
    assert [one["target"] for one in parts] == [False, True] * 2


def test_a_refused_conversation_ends_the_command_with_one_sentence(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = task_recipe(CASE, tmp_path)
    write(tmp_path, *[{"messages": SAID[:1]}] * 60)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fedtune", "data", "show", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "row 1 has no assistant's message, so there is nothing to learn; drop the row" in capsys.readouterr().err


def test_the_sample_has_a_topic_for_each_conversation(home: Path) -> None:
    from fedtune.data.conversation_samples import chatterbot

    table = chatterbot()["train"]
    assert (len(table), len(table.unique("domain"))) == (2026, 21)
    for messages in table["messages"]:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages
