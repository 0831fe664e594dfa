"""Rows of any form as conversations: a list of messages, each with a role and a content."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fedtune.data.column import Column, Values, objects
from fedtune.data.conversation_forms import CONVERSATION_FORMS
from fedtune.data.rows_on_demand import RowsOnDemand
from fedtune.data.table import Table
from fedtune.errors import DataError
from fedtune.recipe.data_settings import ColumnSettings

__all__ = ["Conversation", "Message", "read_conversations"]

Message = dict[str, Any]
Conversation = list[Message]
ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
"""Who speaks in ShareGPT's ``from``."""


def read_conversations(table: Table, form: str, columns: ColumnSettings, source: str) -> dict[str, Column]:
    """The canonical column ``messages``, and ``tools``, None where there are none; DataError names a wrong row.

    Of files that stay on the disk, a row is read and checked each time it is used.
    """
    names = [getattr(columns, key) for key in CONVERSATION_FORMS[form]]
    if form == "instruction" and columns.input in table.column_names:
        names.append(columns.input)
    cells = {name: table.column(name) for name in names}
    messages = RowsOnDemand(cells, partial(_read_row, form), source, np.arange(len(table)))
    return {
        "messages": Values(objects(messages.values())) if table.origin is None else messages,
        "tools": _read_tool_column(table, columns.tools, source),
    }


def _read_tool_column(table: Table, name: str, source: str) -> Column:
    if name not in table.column_names:
        return Values(np.broadcast_to(np.array(None, object), len(table)))
    tools = RowsOnDemand({name: table.column(name)}, partial(_read_tool_row, name), source, np.arange(len(table)))
    return Values(objects(tools.values())) if table.origin is None else tools


def _read_tool_row(name: str, row: Mapping[str, Any], where: str) -> list[Any] | None:
    return _read_tools(row[name], where)


def _read_row(form: str, row: Mapping[str, Any], where: str) -> Conversation:
    optional = 2 if form == "instruction" else len(row)
    for name, cell in list(row.items())[:optional]:
        if cell is None:
            raise DataError(f"{where} has no value in column {name!r}; fill it or drop the row", code="data-values")
    found = _READERS[form](*row.values(), where)
    if not any(message["role"] == "assistant" for message in found):
        raise DataError(f"{where} has no assistant's message, so there is nothing to learn; drop the row")
    return found


def _read_messages(cell: Any, where: str) -> Conversation:
    if not isinstance(cell, list | tuple) or not cell:
        raise DataError(f"{where} has no list of messages; write a list of role and content")
    return [_read_message(message, where) for message in cell]


def _read_message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping) and "from" in message:
        raise DataError(f"{where} has messages with from and value; set the task's format to conversations")
    if not isinstance(message, Mapping) or "role" not in message:
        raise DataError(f"{where} has a message without a role; write a list of role and content")
    _check_role(message["role"], ROLES, where)
    kept = {key: _drop_missing(value) for key, value in message.items() if value is not None}
    if not kept.get("tool_calls"):
        return kept | {"content": _read_text(message.get("content"), where)}
    kept["tool_calls"] = [_read_tool_call(call, where) for call in kept["tool_calls"]]
    return kept | {"content": _read_text(kept.get("content", ""), where)}


def _check_role(role: Any, known: Any, where: str) -> None:
    if role not in known:
        raise DataError(f"{where} has a message of role {role!r}; the roles are {', '.join(known)}")


def _read_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    kind = "no content" if content is None else f"a content that is no text but a {type(content).__name__}"
    raise DataError(f"{where} has a message with {kind}; write text, since pictures and sounds are not read here")


def _drop_missing(value: Any) -> Any:
    """Without the keys that have no value: tables fill them in where another row has them."""
    if isinstance(value, Mapping):
        return {key: _drop_missing(one) for key, one in value.items() if one is not None}
    return [_drop_missing(one) for one in value] if isinstance(value, list | tuple) else value


def _read_tool_call(call: Any, where: str) -> Any:
    """A call with its arguments as a mapping, as chat templates take them; some data have them as JSON."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or "name" not in inner:
        raise DataError(f"{where} has a tool call without a name; write function, with name and arguments")
    arguments = inner.get("arguments", {})
    read = {**inner, "arguments": _parse_json(arguments, f"{where} has a tool call with arguments that are no JSON")}
    return {**call, "function": read} if "function" in call else read


def _parse_json(value: Any, problem: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{problem}; mend the row") from error


def _read_tools(cell: Any, where: str) -> list[Any] | None:
    """The tools' descriptions, which may be written as JSON."""
    if cell is None:
        return None
    tools = _drop_missing(_parse_json(cell, f"{where} has tools that are no JSON"))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where} has tools that are no list of descriptions; write one JSON schema per tool")
    return tools or None


def _read_prompt_completion(prompt: Any, completion: Any, where: str) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        return _ask_and_reply(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{where} has a text beside messages in prompt and completion; write both alike")
    return [*_read_messages(prompt, where), *_read_messages(completion, where)]


def _read_instruction(instruction: Any, output: Any, *rest: Any) -> Conversation:
    """As Alpaca has it: the input, where there is one, follows the instruction after an empty line."""
    added, where = rest if len(rest) == 2 else (None, rest[0])
    asked = [_read_text(part, where) for part in (instruction, added) if part]
    return _ask_and_reply("\n\n".join(asked), _read_text(output, where))


def _ask_and_reply(asked: str, reply: str) -> Conversation:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]


def _read_sharegpt(cell: Any, where: str) -> Conversation:
    if not isinstance(cell, list | tuple) or not cell:
        raise DataError(f"{where} has no list of messages; write a list of from and value")
    return [_read_turn(turn, where) for turn in cell]


def _read_turn(turn: Any, where: str) -> Message:
    if isinstance(turn, Mapping) and "role" in turn and "from" not in turn:
        raise DataError(
            f"{where} has messages with role and content; set the task's format to messages and name the column in "
            "data.columns.messages"
        )
    if not isinstance(turn, Mapping) or "from" not in turn:
        raise DataError(f"{where} has a message that does not say whom it is from; write a list of from and value")
    _check_role(turn["from"], tuple(_SPEAKERS), where)
    return {"role": _SPEAKERS[turn["from"]], "content": _read_text(turn.get("value"), where)}


_READERS: Mapping[str, Callable[..., Conversation]] = {
    "messages": _read_messages,
    "prompt-completion": _read_prompt_completion,
    "instruction": _read_instruction,
    "conversations": _read_sharegpt,
}
