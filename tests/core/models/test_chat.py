"""Chats with the tokenizer's template: scored turns, found by marks or by prefixes, and invalid chats."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from braces_cli.core.errors import DataError
from braces_cli.core.models.tokenize import IGNORED, encode_chat, turn_ends
from braces_cli.data.dataset import decode_parts
from tests.conftest import tiny_tokenizer

CHAT = [
    {"role": "user", "content": "is it good?"},
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "and the end?"},
    {"role": "assistant", "content": "sad."},
]
TURN = "{{ '<s>' + m['role'] + ':' }}"
OPEN = "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
TEMPLATES = {
    "prefixes": "{% for m in messages %}" + TURN + "{{ m['content'] + '</s>' }}{% endfor %}" + OPEN,
    "line break behind": "{% for m in messages %}" + TURN + "{{ m['content'] + '</s>\n' }}{% endfor %}" + OPEN,
    "marks": "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
    "marks without the end": "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}{%- generation -%}"
    "{{ m['content'] }}{%- endgeneration -%}{{ '</s>' }}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}",
    "no end": "{% for m in messages %}" + TURN + "{{ m['content'] + '\n' }}{% endfor %}" + OPEN,
    "forgets": "{% for m in messages %}" + TURN
    + "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{{ '</s>' }}{% endfor %}" + OPEN,
    "strict": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{{ m['content'] + '</s>' }}{% endfor %}",
}  # fmt: skip


def encoded(template, messages=CHAT, max_length=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES.get(template)
    return tokenizer, encode_chat(tokenizer, {"messages": messages}, "a.jsonl:3", max_length)


@pytest.mark.parametrize(
    ("template", "scored"),
    [
        ("prefixes", ["it is</s>", "sad.</s>"]),
        ("line break behind", ["it is</s>\n", "sad.</s>\n"]),
        ("marks", ["it is</s>", "sad.</s>"]),
        ("marks without the end", ["it is</s>", "sad.</s>"]),
        ("no end", ["it is\n", "sad.\n</s>"]),
    ],
)
def test_only_assistant_turns_are_scored(template, scored):
    """Including the end token of the turn, which is the padding token here."""
    tokenizer, tokens = encoded(template)
    parts = decode_parts(tokenizer, tokens)
    assert [part["text"] for part in parts if part["scored"]] == scored
    text = "".join(part["text"] for part in parts)
    assert text.startswith("<s>user:is it good?")
    assert tokens.ids.count(tokenizer.bos_token_id) == 4  # the template's own, and none in front of it


@pytest.mark.parametrize(
    ("answer", "call", "ends"),
    [
        ("<end>\n", "</call><end>\n", ["<end>"]),  # ChatML on a base model, whose end token is another one
        ("<end>\n</s>", "<eom>", ["<end>", "<eom>"]),
        ("</turn>", "", ["</turn>"]),
        ("[/END]\n", "", ["[/END]"]),
        ("\n", "}", []),
    ],
)
def test_ends_of_turns_are_found_from_the_template(answer, call, ends):
    """Special tokens, another added token, a text; the answer of the last turn and a tool call can end differently."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<end>", "<eom>")])
    tokenizer.add_tokens(["</call>", "</turn>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}"
        f"{{{{ {call!r} }}}}{{% elif m['role'] == 'assistant' %}}{{{{ m['content'] + {answer!r} }}}}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert turn_ends(tokenizer) == ends


def test_truncated_chat():
    """The first tokens and their labels are kept."""
    _, whole = encoded("prefixes")
    _, cut = encoded("prefixes", max_length=40)
    assert (len(cut.ids), cut.truncated, cut.ended) == (40, True, False)
    assert (cut.ids, cut.labels) == (whole.ids[:40], whole.labels[:40])
    assert whole.ended
    assert not whole.truncated
    assert cut.labels[0] == IGNORED


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("none", CHAT, "has no chat template"),
        ("forgets", CHAT, "changes the text around turn 2"),
        ("strict", CHAT[1:], "refuses it: .*roles must alternate"),
        ("prefixes", [], "must be a list of turns"),
        ("prefixes", "hello", "must be a list of turns"),
        ("prefixes", [{"from": "human", "value": "x"}], "turn 1 of `messages` has no role"),
        ("prefixes", [*CHAT, {"role": "user", "content": None}], "turn 5 of `messages` has no text"),
    ],
)
def test_invalid_chats(template, messages, message):
    """DataError with file and line."""
    with pytest.raises(DataError, match=message) as caught:
        encoded(template, messages)
    assert caught.value.where == "a.jsonl:3"


def test_chat_without_an_assistant_turn():
    assert encoded("prefixes", CHAT[:1])[1].scored == 0
