"""The turns of a chat, checked and brought to transformers' form: role and content, calls of tools as objects.

OpenAI's ``messages`` and ShareGPT's ``conversations`` (from and value) are read alike.
"""

from __future__ import annotations

import json
from typing import Any

from htsr.calibration.record_json import from_json
from htsr.errors import SourceError, reason_of

FOR_TEMPLATE = ("tools", "chat_template_kwargs")  # of a record, for the chat template
KNOWN_KEYS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "from", "value")
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool", "developer")}
_SPEAKERS = ("user", "assistant")
_CALLS = ("function_call", "function-call")


def checked_turns(value: Any, key: str, *, of_sharegpt: bool = False) -> list[dict[str, Any]]:
    """A list of turns with role and content, what else they have as it is.

    The parts of a content are joined, where all are text; a turn that only calls tools has the content ``""``;
    arguments of a call that are JSON in a text, as OpenAI writes them, become an object, as chat templates read them.

    Args:
        value: turns as they were read.
        key: name of the field that they are from, for the message.
        of_sharegpt: whether roles are those of ShareGPT: human, gpt, system, function … They are, too, where a turn has
            from and value, or another word for user or assistant.

    Raises:
        SourceError: a turn has no role or no content that is text, a role of ShareGPT is unknown, or role and from, or
            content and value, say two things.

    Examples:
        >>> from htsr.calibration.record_turns import checked_turns
        >>> checked_turns([{"from": "human", "value": "1 + 1?"}], "conversations", of_sharegpt=True)
        [{'role': 'user', 'content': '1 + 1?'}]
    """
    if not isinstance(value, list) or not value:
        kind = "an empty one" if value == [] else kind_of(value) + " without JSON of one" * isinstance(value, str)
        raise SourceError(f"{key} is a list of turns, not {kind}")
    of_sharegpt = of_sharegpt or any(map(_is_of_sharegpt, value))  # which is found under messages, too
    return [_turn(turn, f"{key}[{i}]", of_sharegpt) for i, turn in enumerate(value)]


def turns_in(text: str) -> Any:
    """The list of turns that is written in a `text` as JSON; the text itself where there is none.

    Raises:
        SourceError: there is one, and an object in it has a key twice.

    Examples:
        >>> from htsr.calibration.record_turns import turns_in
        >>> turns_in('[{"role": "user", "content": "1 + 1?"}]')
        [{'role': 'user', 'content': '1 + 1?'}]
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if are_turns(found):  # else it may be a text about JSON
        return from_json(text)
    return found if isinstance(found, list) else text


def are_turns(value: Any) -> bool:
    """Whether a `value` is a list of turns, each with who speaks and what, and of nothing else.

    Examples:
        >>> from htsr.calibration.record_turns import are_turns
        >>> are_turns([{"role": "user", "content": "1 + 1?"}]), are_turns([1, 2]), are_turns([])
        (True, False, False)
    """
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and {"role", "from"} & set(turn) and {"content", "value", "tool_calls"} & set(turn)
            for turn in value
        )
    )


def _is_of_sharegpt(turn: Any) -> bool:
    """Whether a `turn` has from for its role, or a role that is another word for user or assistant."""
    if not isinstance(turn, dict):
        return False
    role = turn.get("role")
    if role is None:
        return "from" in turn
    return role not in _SPEAKERS and _role(role) in _SPEAKERS


def _role(word: Any) -> Any:
    return _ROLES.get(word.lower(), word) if isinstance(word, str) else word


def _turn(value: Any, where: str, of_sharegpt: bool) -> dict[str, Any]:
    turn = {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else {}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in turn and ours not in turn:
            turn[ours] = turn.pop(theirs)
    if _role(turn.get("from")) in _ROLES.values() and _role(turn["from"]) != _role(turn["role"]):
        raise SourceError(f"{where} has the role {turn['role']!r} and is from {turn['from']!r}: leave one of them")
    if isinstance(turn.get("value"), str) and turn["value"] != turn["content"]:
        raise SourceError(f"{where} has a content and another value: leave one of them")
    if not isinstance(turn.get("role"), str):
        raise SourceError(f"{where} is a turn with role and content, not {kind_of(value)}")
    if of_sharegpt:
        turn = _of_sharegpt(turn, where)
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
            raise SourceError(f"{where} has content that is not text; causal language models are trained on text")
        content = "".join(part["text"] for part in parts)
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(turn["tool_calls"], where)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise SourceError(f"{where}.content is a text, not {kind_of(content)}")
    return turn | {"content": content}


def _of_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    role = turn["role"].lower()
    if role in _CALLS:
        call = _object(turn.get("content"))
        if call is None or not isinstance(call.get("name"), str):
            raise SourceError(f"{where} is a call of a function, in JSON with name and arguments")
        others = {key: part for key, part in turn.items() if key not in ("role", "content")}
        return {"role": "assistant", **others, "tool_calls": [{"type": "function", "function": call}]}
    if role not in _ROLES:
        raise SourceError(f"{where} is from {turn['role']!r}; there are {', '.join((*_ROLES, *_CALLS))}")
    return turn | {"role": _ROLES[role]}


def _calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise SourceError(f"{where}.tool_calls is a list of calls, not {kind_of(calls)}")
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and (arguments := _object(function.get("arguments"))) is not None:
            call = call | {"function": function | {"arguments": arguments}}
        found.append(call)
    return found


def _object(value: Any) -> dict[str, Any] | None:
    """What a text says that is a JSON object, with each key once; None where it is none."""
    try:
        found = from_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def for_template(record: dict[str, Any]) -> dict[str, Any]:
    """Tools and variables of the chat template in a `record`, each absent or of its kind.

    Raises:
        SourceError: tools are no list, or variables no keys and values.
    """
    found = {key: record[key] for key in FOR_TEMPLATE if record.get(key) is not None}
    for key, none in (("tools", []), ("chat_template_kwargs", {})):
        if isinstance(text := found.get(key), str):  # as TRL takes tools, too
            try:
                found[key] = from_json(text) if text.strip() else none
            except ValueError as error:
                raise SourceError(f"{key} is no JSON: {reason_of(error)}") from error
    if not isinstance(found.get("tools", []), list):
        raise SourceError(f"tools is a list, not {kind_of(found['tools'])}")
    more = found.get("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise SourceError(f"chat_template_kwargs holds keys and values, not {kind_of(more)}")
    return found


def kind_of(value: Any) -> str:
    """What a message calls the kind of a `value` that came from JSON."""
    names = {type(None): "null", dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
