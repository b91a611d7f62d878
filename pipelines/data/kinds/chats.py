"""Chats as users bring them, made into the one form that chat templates know.

| form | a row |
|---|---|
| OpenAI | `{"messages": [{"role": "user", "content": "…"}, …]}`, with `tool_calls`, `tools` and the role `tool` |
| ShareGPT | `{"conversations": [{"from": "human", "value": "…"}, …]}` |
| Alpaca | `{"instruction": "…", "input": "…", "output": "…"}` |
| templates | what `prompt` and `completion` of the task make of a row |

What a template then makes of a chat is in chat_template.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.config.tasks import ALPACA, GenerationTask
from pipelines.data.encoding import fill
from pipelines.data.kinds.base import Row, short, template_problems, text_problems

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

Message = dict[str, Any]


def chat_of(task: GenerationTask, row: Row, answered: bool = True) -> list[Message]:
    """The chat of a valid row: roles, text and tool calls as chat templates expect them.

    Args:
        answered: with the answer, where other fields than those of the question hold it.
    """
    if task.messages is None:
        return _of_fields(task, row, answered)
    sharegpt = task.format == "sharegpt"
    chat = [_of_sharegpt(message) if sharegpt else _clean(message) for message in row[task.messages]]
    return _folded(chat) if task.fold_system else chat


def _of_fields(task: GenerationTask, row: Row, answered: bool) -> list[Message]:
    if task.format == "alpaca":
        instruction, more, output = ALPACA
        asked = f"{row[instruction]}\n{row[more]}" if row[more] else row[instruction]
        answer = row[output] if answered else None
    else:
        asked, answer = fill(task.prompt, row), fill(task.completion, row) if answered else None
    chat = [{"role": "user", "content": asked}]
    return [*chat, {"role": "assistant", "content": answer}] if answered else chat


def _of_sharegpt(message: Mapping) -> Message:
    role, value = SHAREGPT_ROLES[message["from"]], message["value"]
    if message["from"] != "function_call":
        return {"role": role, "content": value}
    called = json.loads(value)
    return _clean({"role": role, "tool_calls": called if isinstance(called, list) else [called]})


def _clean(message: Mapping) -> Message:
    """A message without absent fields, with text as its content and its calls as mappings."""
    found = {name: value for name, value in message.items() if value is not None}
    calls = [_call(call) for call in found.pop("tool_calls", None) or ()]
    return {**found, "content": found.get("content", ""), **({"tool_calls": calls} if calls else {})}


def _call(call: Mapping) -> dict:
    """A tool call in OpenAI's form; arguments that are JSON text become a mapping, which templates write as JSON."""
    function = dict(call.get("function") or {name: call.get(name) for name in ("name", "arguments")})
    arguments = function.get("arguments")
    arguments = _json(arguments) if isinstance(arguments, str) else _present(arguments)
    names = {name: value for name, value in call.items() if name in ("id", "type") and value is not None}
    return {"type": "function", **names, "function": {"name": function["name"], "arguments": arguments or {}}}


def _present(value: Any) -> Any:
    """A nested value without the empty fields that columnar formats add to rows that lack them."""
    if isinstance(value, Mapping):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _folded(chat: list[Message]) -> list[Message]:
    """The chat with its system message put before the first user's text."""
    if chat[0]["role"] != "system":
        return chat
    told, rest = chat[0]["content"], [dict(message) for message in chat[1:]]
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{told}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": told}, *rest]


def asked_row(task: GenerationTask, text: str) -> dict:
    """A row of the task's own form in which a user says `text`."""
    row: dict[str, Any] = {task.tools: None} if task.tools else {}
    if task.format == "alpaca":
        instruction, more, _ = ALPACA
        return row | {instruction: text, more: ""}
    said = {"from": "human", "value": text} if task.format == "sharegpt" else {"role": "user", "content": text}
    return row | {task.messages: [said]}


def tools_of(task: GenerationTask, row: Row) -> list[dict] | None:
    """The JSON schemas of the tools that a valid row offers; None if there are none."""
    found = row[task.tools] if task.tools else None
    found = _json(found) if isinstance(found, str) else found
    return [_schema(tool) for tool in found] if found else None


def _schema(tool: Mapping | str) -> dict:
    schema = json.loads(tool) if isinstance(tool, str) else _present(tool)
    return schema if "function" in schema else {"type": "function", "function": schema}


def asked_of(chat: Sequence[Message]) -> list[Message]:
    """The messages before the answer; all of them if the last one is not by the assistant."""
    return list(chat[:-1] if chat[-1]["role"] == "assistant" else chat)


def answers_in(chat: Sequence[Message], learn: str) -> list[int]:
    """Positions of the messages that have a loss: the last, and with `all` the assistant's after the first user's."""
    last = len(chat) - 1
    if learn == "last":
        return [last]
    first = next((i for i, message in enumerate(chat) if message["role"] == "user"), last)
    return [i for i, message in enumerate(chat) if i == last or (i > first and message["role"] == "assistant")]


def shown(message: Message) -> str:
    """What a message says, for reading: its text, and its tool calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in (message["content"], *calls) if part)


# -- problems


def chat_problems(task: GenerationTask, row: Row) -> Iterator[str]:
    """Why a row holds no chat, or no tools."""
    if task.tools:
        yield from _tools_problems(task.tools, row[task.tools])
    if task.messages:
        yield from _messages_problems(task.messages, row[task.messages], task.format == "sharegpt")
    elif task.format == "alpaca":
        instruction, more, _ = ALPACA
        yield from text_problems(instruction, row[instruction])
        yield from text_problems(more, "" if row[more] is None else row[more], empty=False)
    else:
        yield from template_problems(task.prompt, row)


def answer_problems(task: GenerationTask, row: Row) -> Iterator[str]:
    """Why a chat without other problems has no answer to learn."""
    if task.format == "alpaca":
        yield from text_problems(ALPACA[-1], row[ALPACA[-1]])
    elif task.messages is None:
        yield from template_problems(task.completion, row)
    else:
        chat = chat_of(task, row)
        if len(chat) < 2 or chat[-1]["role"] != "assistant":
            yield (
                f"'{task.messages}' ends with message {len(chat)} of the role '{chat[-1]['role']}', expected at least "
                "two that end with the assistant's answer; add it or drop the row"
            )


def _messages_problems(column: str, value: Any, sharegpt: bool) -> Iterator[str]:
    form = "{from, value}" if sharegpt else "{role, content}"
    if not isinstance(value, list) or not value:
        yield f"'{column}' is {short(value)}, expected a list of {form}; write it as a list"
        return
    for position, message in enumerate(value, 1):
        where = f"'{column}', message {position}"
        if not isinstance(message, dict):
            yield f"{where} is {short(message)}, expected {form} with text"
        elif sharegpt:
            yield from _sharegpt_problems(where, message)
        else:
            yield from _message_problems(where, column, position, message)


def _sharegpt_problems(where: str, message: Mapping) -> Iterator[str]:
    role, value = message.get("from"), message.get("value")
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        yield f"{where} is from {short(role)}, use one of: {', '.join(SHAREGPT_ROLES)}"
    elif not isinstance(value, str):
        yield f"{where} is {short(message)}, expected {{from, value}} with text"
    elif role == "function_call":
        called = _json(value)
        for call in called if isinstance(called, list) and called else [called]:
            yield from _call_problems(where, call)
    else:
        yield from text_problems(where.replace("'", ""), value, empty=SHAREGPT_ROLES[role] != "tool")


def _message_problems(where: str, column: str, position: int, message: Mapping) -> Iterator[str]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    calling = bool(calls) and role == "assistant"
    if not (isinstance(content, str) or (content is None and calling)):
        yield f"{where} is {short(dict(message))}, expected {{role, content}} with text"
    elif role not in ROLES:
        yield f"{where} has the role {short(role)}, use one of: {', '.join(ROLES)}"
    elif calls and not (calling and isinstance(calls, list)):
        yield f"{where} has tool_calls {short(calls)}, expected a list in a message of the assistant"
    elif content is not None:
        yield from text_problems(f"{column}, message {position}", content, empty=not calling and role != "tool")
    for call in calls if calling and isinstance(calls, list) else ():
        yield from _call_problems(where, call)


def _call_problems(where: str, call: Any) -> Iterator[str]:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    arguments = _json(arguments or "{}") if isinstance(arguments, str) else arguments or {}
    named = isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]
    if not named or not isinstance(arguments, Mapping):
        yield f"{where} calls {short(call)}, expected {{name, arguments}} with arguments by name or as their JSON text"


def _tools_problems(column: str, value: Any) -> Iterator[str]:
    if value is None or value == "":
        return  # this chat has no tools
    found = _json(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        yield f"'{column}' is {short(value)}, expected a list of tools (JSON schemas) or its JSON text"
        return
    for position, tool in enumerate(found, 1):
        tool = _json(tool) if isinstance(tool, str) else tool
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            yield f"'{column}', tool {position} is {short(tool)}, expected a JSON schema with a name"


def _json(text: str) -> Any:
    """The value of a JSON text; None for any other text."""
    try:
        return json.loads(text)
    except ValueError:
        return None
