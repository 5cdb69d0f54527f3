"""A row's messages, tools and template arguments in the form that its chat template reads.

Undoes what Arrow and JSON do to messages: nulls of fields that other rows have, empty lists of calls, tools and
arguments written as JSON text. A probe, rendered once, shows which form of arguments and contents a template prints
unchanged. Imports transformers, `messages` and `templates`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from prefopt.data.errors import DataError
from prefopt.data.messages import read_json, without_nulls
from prefopt.data.templates import time_limit

Row = Mapping[str, Any]
Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin

_ARGUMENTS = {"where": 'a "b" c'}
_QUESTION, _ANSWER, _AGAIN = "What then?", "So it is.", "And now?"
_ROLES = "user", "assistant", "user"


def for_template(messages: list[Any], processing_class: Processing) -> list[Any]:
    """The messages in the form for the template; their texts are not changed."""
    return [_message(message, processing_class) for message in messages]


def template_arguments(example: Row) -> dict[str, Any]:
    """Tools (a list, or JSON as some sets store it) and chat-template arguments; nulls are columns of other rows."""
    extra = example.get("chat_template_kwargs") or {}
    given = {name: value for name, value in extra.items() if value is not None}
    return {"tools": read_tools(example.get("tools")), **given}


def read_tools(tools: Any) -> list[Any] | None:
    """The descriptions of functions; the list and its items may be JSON text. None if there are none.

    Raises:
        ValueError: for text that is not JSON.
    """
    tools = read_json(tools)
    return [without_nulls(read_json(tool)) for tool in tools] if tools else None


def calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The message's calls as {"name", "arguments"}, from `tool_calls` (functions inside or not) or `function_call`."""
    calls = message.get("tool_calls") or []
    inner = [call.get("function") or call for call in calls if isinstance(call, dict)]
    single = message.get("function_call")
    return inner + ([single] if isinstance(single, dict) else [])


def _message(message: Any, processing_class: Processing) -> Any:
    if not isinstance(message, dict):
        return message
    message = without_nulls(message)
    if isinstance(calls := message.get("tool_calls"), str) and calls.strip().startswith("["):
        message["tool_calls"] = json.loads(calls)
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    if calls_of(message):
        # An answer with only calls has no content, and templates need an empty one.
        message = _with_arguments({"content": "", **message}, processing_class)
    content = message.get("content")
    if isinstance(processing_class, ProcessorMixin):
        # Templates of multimodal models expect a list of parts where text models expect a string.
        return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    if isinstance(content, str) and _reads(processing_class, _key(processing_class), "parts alone"):
        return {**message, "content": [{"type": "text", "text": content}]}
    only_text = isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content)
    if only_text and _reads(processing_class, _key(processing_class), "text alone"):
        return {**message, "content": "\n".join(str(part["text"]) for part in content)}
    return message


def _with_arguments(message: dict[str, Any], processing_class: Processing) -> dict[str, Any]:
    """Arguments as an object or as JSON text: unchanged, unless the template prints only the other form."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function") or call if isinstance(call, dict) else {}
        arguments = _fitting(inner.get("arguments"), processing_class)
        if arguments is inner.get("arguments"):
            calls.append(call)
        elif "function" in call:
            calls.append({**call, "function": {**inner, "arguments": arguments}})
        else:
            calls.append({**call, "arguments": arguments})
    return {**message, "tool_calls": calls}


def _fitting(arguments: Any, processing_class: Processing) -> Any:
    if not isinstance(arguments, str | dict):
        return arguments
    prints = functools.partial(_prints_arguments, processing_class, _key(processing_class))
    if prints(isinstance(arguments, str)) or not prints(isinstance(arguments, dict)):
        return arguments
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False, default=str)
    try:
        read = json.loads(arguments)
    except ValueError:
        return arguments
    return read if isinstance(read, dict) else arguments


def _key(processing_class: Processing) -> str:
    """What the result of a probe depends on, besides the tokenizer."""
    return str(getattr(processing_class, "chat_template", None))


@functools.lru_cache(maxsize=32)
def _prints_arguments(processing_class: Processing, _: str, as_text: bool) -> bool:
    """Whether the template prints a call's arguments in this form: not quoted again and not as Python literals."""
    text = json.dumps(_ARGUMENTS)
    call = {"name": "find", "arguments": text if as_text else _ARGUMENTS}
    asked = {"role": "user", "content": _QUESTION}
    answered = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": call}],
    }
    tool = {"name": "find", "description": "", "parameters": {"type": "object", "properties": {}}}
    printed = _probe([asked, answered], processing_class, tools=[{"type": "function", "function": tool}])
    if printed is None or str(_ARGUMENTS) in printed:
        return False
    value = _ARGUMENTS["where"]
    return text in printed or any(form in printed for form in (value, json.dumps(value)[1:-1]))


@functools.lru_cache(maxsize=32)
def _reads(processing_class: Processing, _: str, what: str) -> bool:
    """Whether the template reads only texts as contents, or only lists of parts."""
    parts = [{"type": "text", "text": text} for text in (_QUESTION, _ANSWER)]
    listed = _probe([{"role": "user", "content": parts}], processing_class) or ""
    reads_parts = _QUESTION in listed and _ANSWER in listed and "'text'" not in listed
    reads_text = _QUESTION in (_probe([{"role": "user", "content": _QUESTION}], processing_class) or "")
    return reads_text and not reads_parts if what == "text alone" else reads_parts and not reads_text


def user_turn(processing_class: Processing) -> tuple[str, str]:
    """What the template prints before and after a user's text; empty if it refuses the probe."""
    return _user_turn(processing_class, _key(processing_class))


@functools.lru_cache(maxsize=32)
def _user_turn(processing_class: Processing, _: str) -> tuple[str, str]:
    printed = _probe([_turn("user", _QUESTION, processing_class)], processing_class)
    before, _found, behind = (printed or "").partition(_QUESTION)
    return before, behind


def answers_end(processing_class: Processing) -> str:
    """What the template prints after an answer, stripped; empty if it refuses the probe."""
    return _answers_end(processing_class, _key(processing_class))


@functools.lru_cache(maxsize=32)
def _answers_end(processing_class: Processing, _: str) -> str:
    messages = [_turn("user", _QUESTION, processing_class), _turn("assistant", _ANSWER, processing_class)]
    return (_probe(messages, processing_class) or "").partition(_ANSWER)[2].strip()


def answers_begin(processing_class: Processing) -> str:
    """What the template prints before an answer and not before a question; empty if it refuses that."""
    return _answers_begin(processing_class, _key(processing_class))


@functools.lru_cache(maxsize=32)
def _answers_begin(processing_class: Processing, _: str) -> str:
    texts = _QUESTION, _ANSWER, _AGAIN
    messages = [_turn(role, text, processing_class) for role, text in zip(_ROLES, texts, strict=True)]
    printed = _probe(messages, processing_class) or ""
    before, _found, behind = printed.partition(_QUESTION)[2].partition(_ANSWER)
    return "" if before.strip() in behind.partition(_AGAIN)[0] else before.strip()


def _turn(role: str, text: str, processing_class: Processing) -> dict[str, Any]:
    parts = isinstance(processing_class, ProcessorMixin)
    parts = parts or _reads(processing_class, _key(processing_class), "parts alone")
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def _probe(messages: list[Any], processing_class: Processing, **arguments: Any) -> str | None:
    if not getattr(processing_class, "chat_template", None):
        return None
    try:
        with time_limit("the chat template"):
            return str(processing_class.apply_chat_template(messages, tokenize=False, **arguments))
    except DataError:
        raise
    except Exception:
        return None  # a template that needs something else; checking the rows will show it
