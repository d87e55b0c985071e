"""Chats with the tokenizer's template: scored turns, found by marks, by prefixes or one by one, and refused chats."""

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.tokenize import IGNORED, Chat, chat_ids, choose_template, encode_chat, turn_ends
from braces_cli.core.options import ChatSettings
from braces_cli.data.chats import read_chat
from braces_cli.data.dataset import decode_parts
from braces_cli.data.rows import CHAT as ROW_OF_CHAT
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
    "thinks": "{% for m in messages %}" + TURN + "{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'].split('</think>')[-1] + '</s>' }}{% endfor %}" + OPEN,
    "thoughts, no end": "{% for m in messages %}" + TURN
    + "{% if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}{% endfor %}" + OPEN,
    "ends the chat": "{% for m in messages %}" + TURN + "{{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% else %}{{ '</s>' }}{% endif %}",
    "opens thoughts": "{% for m in messages %}" + TURN + "{{ m['content'].split('</think>')[-1] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' + ('<think></think>' if skip else '<think>') }}{% endif %}",
    "changes": "{{ messages | length }}{% for m in messages %}" + TURN + "{{ m['content'] + '</s>' }}{% endfor %}",
    "strict": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{{ m['content'] + '</s>' }}{% endfor %}",
}  # fmt: skip


def encoded(template, messages=CHAT, max_length=None, tools=None):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", *"{}<>"])
    tokenizer.chat_template = TEMPLATES.get(template, template)
    chat = read_chat(ROW_OF_CHAT, {"messages": messages, "tools": tools}, "a.jsonl:3")
    return tokenizer, *encode_chat(tokenizer, chat, "a.jsonl:3", max_length)


def scored_texts(template, messages=CHAT, tools=None):
    """Scored texts of each example."""
    tokenizer, examples, _ = encoded(template, messages, tools=tools)
    return [[part["text"] for part in decode_parts(tokenizer, each) if part["scored"]] for each in examples]


@pytest.mark.parametrize(
    ("template", "scored"),
    [
        ("prefixes", [["it is</s>", "sad.</s>"]]),
        ("line break behind", [["it is</s>\n", "sad.</s>\n"]]),
        ("marks", [["it is</s>", "sad.</s>"]]),
        ("marks without the end", [["it is</s>", "sad.</s>"]]),
        ("no end", [["it is\n", "sad.\n</s>"]]),
        ("thoughts, no end", [["<think></think>it is", "<think></think>sad.</s>"]]),
        ("thinks", [["<think></think>it is</s>"], ["<think></think>sad.</s>"]]),
        ("ends the chat", [["it is\n</s>"], ["sad.\n</s>"]]),
        ("opens thoughts", [["\n</think>\n\nit is</s>"], ["\n</think>\n\nsad.</s>"]]),
    ],
)
def test_only_assistant_turns_are_scored(template, scored):
    """Including the end token of the turn, which is the padding token here; the prompt is that of generation."""
    tokenizer, examples, notes = encoded(template)
    assert scored_texts(template) == scored
    assert [each.ids.count(tokenizer.bos_token_id) for each in examples] == ([4] if len(scored) == 1 else [2, 4])
    assert bool(notes) == (len(scored) == 2)
    for end, each in zip((1, 3) if len(scored) == 2 else (), examples, strict=False):
        prompt = tokenizer.apply_chat_template(CHAT[:end], tokenize=False, add_generation_prompt=True)
        text = "".join(part["text"] for part in decode_parts(tokenizer, each))
        assert text == prompt + scored[end // 2][0]
    # A turn with weight 0 is context.
    unscored = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    assert scored_texts(template, unscored) == [scored[-1][-1:]]


@pytest.mark.parametrize(
    ("template", "content", "scored"),
    [
        ("opens thoughts", "<think>why?</think>\nit is", "why?\n</think>\n\nit is</s>"),
        ("opens thoughts", "<think>why?</think><b>", "why?\n</think>\n\n<b></s>"),
        ("{% set skip = true %}" + TEMPLATES["opens thoughts"], "<think>why?</think>it is", "it is</s>"),
        (
            "{% set skip = true %}" + TEMPLATES["opens thoughts"].replace(".split('</think>')[-1]", ""),
            "<think>why?</think>it is",
            "it is</s>",
        ),
    ],
)
def test_thoughts_follow_the_prompt_that_opens_them(template, content, scored):
    """Thoughts that the template leaves out of a turn are scored if the prompt of generation starts them."""
    found = scored_texts(template, [CHAT[0], {"role": "assistant", "content": content}])
    assert found == [[scored]]


@pytest.mark.parametrize("name", ["tiny", "stories260K"])
def test_the_prompt_has_its_tokens_of_generation(name, request):
    """Also if prompt and answer could share a token; not with a tokenizer that starts each text with a space."""
    folder = None if name == "tiny" else request.getfixturevalue("shared") / "models" / name
    tokenizer = tiny_tokenizer() if folder is None else AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = Chat([{"role": "user", "content": "the cat and t"}, CHAT[1] | {"content": "he end"}], [False, True])
    ids, prompt = encode_chat(tokenizer, chat, "a")[0][0].ids, list(chat_ids(tokenizer, "the cat and t"))
    assert tokenizer.decode(ids).startswith("the cat and the end")
    assert (ids[: len(prompt)] == prompt) == (name == "tiny")


CALL = {"type": "function", "function": {"name": "root", "arguments": '{"x": 9}'}}
CALLS = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]


def tool_template(write="c.function.arguments | tojson", condition="'tool_calls' in m"):
    """A template that writes the calls of a turn in the place of its content."""
    calls = "{% for c in m.tool_calls %}{{ c.function.name }}{{ " + write + " }}{% endfor %}{{ '</s>' }}"
    turn = "{{ '<s>' }}{% if " + condition + " %}" + calls + "{% else %}{{ m.content + '</s>' }}{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"


def test_tool_calls_in_the_form_that_the_template_accepts():
    """Arguments as an object, as text, and text where an object would appear as Python; null as the content."""
    for template in (
        tool_template(),
        tool_template("'' + c.function.arguments"),
        tool_template("c.function.arguments"),
        tool_template(condition="m.content is none"),
    ):
        assert scored_texts(template, CALLS) == [['root{"x": 9}</s>']]


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


@pytest.mark.parametrize(
    ("value", "shown"), [("False", "no"), ("true", "yes True"), ("0.5", "yes 0.5"), ("a 'b' %}", "yes a 'b' %}")]
)
def test_arguments_of_the_template(value, shown):
    """JSON values or text; visible in macros, and replaced by the caller's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% macro f() %}{{ 'yes ' ~ x if x else 'no' }}{% endmacro %}{{ f() }}"
    stored = choose_template(tokenizer, build(ChatSettings, {"chat_template_kwargs": [f"x = {value}"]}))
    assert stored == tokenizer.chat_template
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == shown
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, x=2) == "yes 2"


@pytest.mark.parametrize("text", ["be kind", "", "a \"b\" '%}' {{ c }}\n\\ \U0001f600"])
def test_the_system_prompt_is_for_chats_without_one(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    choose_template(tokenizer, build(ChatSettings, {"system_prompt": text}))
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False) == f"[{text}][is it good?]"
    own = [{"role": "system", "content": "own"}, CHAT[0]]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "[own][is it good?]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template_kwargs": ["x"]}, "`x` is not KEY=VALUE"),
        ({"chat_template_kwargs": ["a-b=1"]}, "`a-b=1` is not KEY=VALUE"),
        ({"chat_template": "none.jinja"}, "no such file"),
        ({"system_prompt": "x"}, "has no chat template"),
    ],
)
def test_invalid_options_of_the_template(options, message):
    with pytest.raises(ConfigError, match=message):
        choose_template(tiny_tokenizer(), build(ChatSettings, options))


def test_truncated_chat():
    """The first tokens and their labels are kept."""
    _, (whole,), _ = encoded("prefixes")
    _, (cut,), _ = encoded("prefixes", max_length=40)
    assert (len(cut.ids), cut.truncated) == (40, True)
    assert (cut.ids, cut.labels) == (whole.ids[:40], whole.labels[:40])
    assert not whole.truncated
    assert cut.labels[0] == IGNORED


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "has no chat template"),
        ("changes", CHAT, "changes the text before turn 2"),
        ("strict", CHAT[1:], "refuses it: .*roles must alternate"),
        ("prefixes", CALLS, "leaves out the tool call `root` of turn 2"),
        (tool_template("''"), CALLS, "leaves out the tool call `root` of turn 2"),
        (tool_template(), [CALLS[0], CALLS[1] | {"content": "I see"}], "leaves out the content of turn 2"),
    ],
)
def test_refused_chats(template, messages, message):
    """DataError with file and line; a template that drops a part of a scored turn is one of the reasons."""
    with pytest.raises(DataError, match=message) as caught:
        encoded(template, messages)
    assert caught.value.where == "a.jsonl:3"


def test_parts_that_the_template_leaves_out_of_the_prompt():
    """Tools are needed; other turns are a note."""
    with pytest.raises(DataError, match="leaves out the tool `root`"):
        encoded("prefixes", CHAT, tools=[{"type": "function", "function": {"name": "root"}}])
    template = "{% for m in messages if m.role != 'system' %}" + TURN + "{{ m.content + '</s>' }}{% endfor %}" + OPEN
    _, _, notes = encoded(template, [{"role": "system", "content": "be kind"}, *CHAT])
    assert notes == ["the chat template leaves out turns of `system`"]


def test_chat_without_an_assistant_turn():
    assert encoded("prefixes", CHAT[:1])[1][0].scored == 0
