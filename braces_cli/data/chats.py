"""Chats of rows, converted to the form that chat templates expect.

Values are converted only if their meaning is unambiguous. A note reports a conversion that the user should know.
"""

from collections.abc import Mapping
from typing import Any

from braces_cli.core.errors import DataError
from braces_cli.core.models.tokenize import Chat
from braces_cli.core.schema import Malformed, cut, decode
from braces_cli.data.rows import CHAT, CONVERSATIONS, PAIR, PREFERENCE, Format

# Names of roles in other formats.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
}  # fmt: skip
# Keys of a turn: 1 or true if it is scored, 0 or false if not.
_WEIGHTS = ("weight", "trainable", "train", "training", "loss")
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_chat(kind: Format, fields: Mapping[str, Any], where: str) -> Chat | None:
    """Chat of a row, None if the row holds texts; turns of a `prompt` are not scored.

    Raises:
        DataError: invalid turns, tool calls, tools or weights.
    """
    notes = {kind.note} - {""}
    key = kind.needed[-1] if kind is PAIR else kind.needed[0]
    if kind not in (CHAT, CONVERSATIONS) and not isinstance(fields.get(key), list):
        return None
    messages, scored = _turns(fields[key], key, where, notes)
    before, role, first = fields.get("system"), "system", messages[0]["role"]
    if kind in (PAIR, PREFERENCE):
        before, role = fields.get("prompt"), "user"
    # `chosen` can start with the prompt, and a conversation with its system turn.
    if before and first != "system" and (kind is not PREFERENCE or first == "assistant"):
        before = [{"role": role, "content": before}] if isinstance(before, str) else before
        earlier, _ = _turns(before, "prompt", where, notes)
        messages, scored = earlier + messages, [False] * len(earlier) + scored
    tools = _objects(_without_nulls(fields.get("tools") or []), "tools", where)
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            raise DataError("`tools` must be a list of objects", where=where, hint="Fix the row.")
        if "parameters" in function:
            function["parameters"] = _parsed(function["parameters"])
    return Chat(messages, scored, tools or None, tuple(sorted(notes)))


def _turns(value: Any, key: str, where: str, notes: set[str]) -> tuple[list[dict[str, Any]], list[bool]]:
    """Turns in the standard form, and which of them are scored."""
    if isinstance(value, str):
        notes.add(f"`{key}` read from JSON text")
    turns = _objects(value, key, where)
    if not turns:
        raise DataError(f"`{key}` has no turns", where=where, hint="Fix the row.")
    found = [_turn(_without_nulls(turn), f"{where}, turn {number}", notes) for number, turn in enumerate(turns, 1)]
    return [turn for turn, _ in found], [is_scored for _, is_scored in found]


def _turn(turn: dict[str, Any], where: str, notes: set[str]) -> tuple[dict[str, Any], bool]:
    """A turn in the standard form, without empty lists, and whether it is scored."""
    turn = {key: value for key, value in turn.items() if value != []}
    if "role" not in turn and "from" in turn:
        turn |= {"role": turn.pop("from"), "content": turn.pop("value", None)}
    written = turn.get("role")
    if not isinstance(written, str):
        raise DataError("no role", where=where, hint='A turn is {"role": ..., "content": ...}.')
    role = _ROLES.get(written.lower(), written)
    if role != written:
        notes.add(f"role `{written}` read as `{role}`")
    content = turn.get("content")
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        if not all(isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_PARTS for part in parts):
            raise DataError("content other than text", where=where, hint="Remove images and other files.")
        content = "".join(part["text"] for part in parts)
        notes.add("text parts of a content joined")
    calls = turn.pop("tool_calls", None) or turn.pop("function_call", None)
    if written == "function_call":
        calls, content = content, ""
    if calls:
        turn["tool_calls"] = [_tool_call(call, where) for call in _objects(calls, "tool_calls", where)]
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise DataError("no text content", where=where, hint="The content of a turn is text.")
    weights = [turn.pop(key) for key in _WEIGHTS if key in turn]
    if not all(weight in (0, 1) for weight in weights):
        raise DataError(f"weight {cut(str(weights[0]))}", where=where, hint="A weight is 0 (not scored) or 1.")
    is_scored = role == "assistant" and all(weights) and bool(calls or content.strip())
    return {**turn, "role": role, "content": content}, is_scored


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    call = call if "function" in call else {"function": call}
    function = _parsed(call["function"])
    arguments = _parsed(function.get("arguments") or {}) if isinstance(function, dict) else None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        hint = 'Write {"function": {"name": ..., "arguments": {...}}}.'
        raise DataError("an invalid tool call", where=where, hint=hint)
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _objects(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    """A list of objects; list and objects can be JSON text, and a single object is a list of one."""
    value = _parsed(value)
    items = [_parsed(item) for item in value] if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in items):
        raise DataError(f"`{key}` must be a list of objects", where=where, hint="Fix the row.")
    return items


def _parsed(value: Any) -> Any:
    """Value of a JSON text; other values and texts unchanged."""
    while isinstance(value, str):
        try:
            value = decode(value)
        except Malformed:
            break
    return value


def _without_nulls(value: Any) -> Any:
    """Copy without null members at every depth, which Arrow adds; of other types than those of JSON their text."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
