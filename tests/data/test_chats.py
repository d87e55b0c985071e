"""Chats of rows in the form that templates expect, from the forms of other programs."""

import json

import pytest

from braces_cli.core.errors import DataError
from braces_cli.data.chats import read_chat
from braces_cli.data.rows import Source, parts, read_format

CHAT = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "number"}}, "required": []}
TOOL = {"type": "function", "function": {"name": "root", "parameters": SCHEMA}}


def read(fields):
    return read_chat(*read_format(Source(fields, "a.jsonl:7"), {}), "a.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"conversations": [{"from": "human", "value": "how are you?"}, {"from": "gpt", "value": "fine"}]}, "`gpt`"),
        ({"conversations": CHAT, "system": ""}, None),
        ({"messages": json.dumps(CHAT)}, "read from JSON text"),
        ({"messages": [CHAT[0], CHAT[1] | {"role": "Assistant"}]}, "role `Assistant` read as `assistant`"),
        ({"messages": [CHAT[0], CHAT[1] | {"role": "model"}]}, "role `model` read as `assistant`"),
        ({"messages": [CHAT[0], CHAT[1] | {"content": [{"type": "text", "text": "fi"}, "ne"]}]}, "text parts"),
        ({"messages": [CHAT[0] | {"name": None, "tool_calls": [], "images": []}, CHAT[1] | {"trainable": True}]}, None),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, None),
        ({"prompt": "how are you?", "completion": CHAT[1:], "tools": []}, None),
        ({"prompt": "how are you?", "chosen": CHAT[1:], "rejected": CHAT[:1]}, "`rejected` is not read"),
        ({"prompt": "how are you?", "chosen": CHAT, "rejected": CHAT}, "`rejected` is not read"),
    ],
)
def test_other_forms_of_one_chat(fields, note):
    """A note if the conversion is more than another spelling."""
    chat = read(fields)
    assert (chat.messages, chat.scored) == (CHAT, [False, True])
    assert [text for text in chat.notes if note in text] if note else not chat.notes


@pytest.mark.parametrize(
    ("turn", "scored"),
    [({"weight": 0}, False), ({"weight": 1.0}, True), ({"trainable": False}, False), ({"content": " "}, False)],
)
def test_scored_turns(turn, scored):
    """Turns of a prompt, with weight 0, and blank ones are context."""
    assert read({"messages": [*CHAT, CHAT[1] | turn]}).scored == [False, True, scored]
    assert read({"prompt": CHAT, "completion": CHAT[1:]}).scored == [False, False, True]


def test_the_system_text_of_a_conversation():
    """A system turn of the conversation precedes it."""
    own = {"role": "system", "content": "be kind"}
    for turns, system in ((CHAT, "be kind"), ([own, *CHAT], "be sad")):
        assert read({"conversations": turns, "system": system}).messages == [own, *CHAT]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"function": {"name": "root", "arguments": {"x": [], "y": None}}}]},
        {"tool_calls": json.dumps([{"name": "root", "arguments": '{"x": []}'}])},
        {"content": "", "function_call": {"name": "root", "arguments": {"x": []}}},
        {"role": "function_call", "content": '{"name": "root", "arguments": {"x": []}}'},
    ],
)
def test_tool_calls_become_objects(turn):
    """Also tools as JSON text; Arrow's nulls are dropped, but an empty list is a value of the author."""
    text = {"type": "function", "function": {"name": "root", "parameters": json.dumps(SCHEMA)}}
    calls = [{"type": "function", "function": {"name": "root", "arguments": {"x": []}}}]
    for tools in (json.dumps([TOOL]), [TOOL | {"strict": None}], [text], TOOL):
        chat = read({"messages": [CHAT[0], {"role": "assistant", **turn}], "tools": tools})
        assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
        assert (chat.scored, chat.tools) == ([False, True], [TOOL])


def test_preference_rows_of_texts():
    kind, fields = read_format(Source({"prompt": "p", "chosen": "c", "rejected": "r"}, "a.jsonl:7"), {})
    assert read_chat(kind, fields, "a.jsonl:7") is None
    assert parts(kind, fields, "a.jsonl:7") == ("p", "c")
    with pytest.raises(DataError, match="`prompt` must be text"):
        parts(kind, {"chosen": "c", "rejected": "r"}, "a.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "a.jsonl:7: `messages` has no turns"),
        ({"messages": "hello"}, "a.jsonl:7: `messages` must be a list of objects"),
        ({"messages": [{"content": "x"}]}, "a.jsonl:7, turn 1: no role"),
        ({"messages": [*CHAT, {"role": "user", "content": None}]}, "a.jsonl:7, turn 3: no text content"),
        ({"messages": [CHAT[0] | {"content": [{"type": "image", "url": "x"}]}]}, "turn 1: content other than text"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]}, "turn 2: weight 0.5"),
        ({"messages": [CHAT[1] | {"tool_calls": [{"function": {}}]}]}, "turn 1: an invalid tool call"),
        ({"messages": [CHAT[1] | {"tool_calls": [{"name": "f", "arguments": "x"}]}]}, "turn 1: an invalid tool call"),
        ({"messages": CHAT, "tools": ["root"]}, "`tools` must be a list of objects"),
        ({"messages": CHAT, "tools": [{"function": "root"}]}, "`tools` must be a list of objects"),
    ],
)
def test_invalid_chats(fields, message):
    with pytest.raises(DataError, match=message):
        read(fields)
