"""Text and chats as tokens, for training, scoring and prompts; padding and batches.

Special tokens at the start follow the tokenizer. The end token is added for training only (`end=True`), and never to a
prompt.

In a chat only the turns of the assistant are scored. A template with `{% generation %}` marks them. In any other, an
assistant turn is the text between the chat before it, with the generation prompt, and the chat up to and including it.
Each must be a prefix of the next. If the template rewrites earlier turns (leaves out their thoughts, say), each scored
turn is an example: the prompt is the history as in generation, and the turn is its completion.

A template can drop any part of a chat without an error. Therefore contents, tool calls and tools are looked up in the
rendered text, and the chat is refused if one of a scored turn is missing.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from braces_cli.core.errors import ConfigError, DataError, ModelError, first_line
from braces_cli.core.models.hub import is_rust_panic
from braces_cli.core.options import ChatSettings
from braces_cli.core.schema import cut

IGNORED = -100  # label without loss in torch's cross entropy
# A template is a program: it raises TemplateError, and errors of the Python code that it runs.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)
# Model types whose table of positions has unused rows at the start.
_OFFSET_POSITIONS = "roberta|camembert|data2vec-text|xmod|longformer|luke|mpnet|ibert"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Chat:
    """A chat in the form that templates expect.

    Attributes:
        messages: turns with `role` and `content` (text), and possibly `tool_calls` with `arguments` as objects.
        scored: for each turn, True if it has loss; only turns of the assistant have.
        tools: descriptions of the tools.
        notes: conversions of the row that the user should know.
    """

    messages: list[dict[str, Any]]
    scored: list[bool]
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example.

    Attributes:
        ids: token ids.
        labels: the same ids, `IGNORED` for tokens that are not scored.
        truncated: tokens were cut off.
    """

    ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def scored(self) -> int:
        """Number of scored tokens; the first token of a sequence is never scored."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    tokenizer: Any, prompt: str, completion: str | None = None, *, end: bool = False, max_length: int | None = None
) -> Encoded:
    """Encode `prompt`, or `prompt + completion` with only the completion scored.

    Both are encoded as one text, so a token that spans both belongs to the completion.

    Args:
        end: append the end token, with loss.
        max_length: keep this many tokens from the front.
    """
    ids = _prompt_ids(tokenizer, prompt + (completion or ""))
    start = 0 if completion is None else common_length(ids, _prompt_ids(tokenizer, prompt))
    if not ids:
        # An empty text, and a tokenizer without a start token: text can be generated from any token.
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        ids = [next(token for token in special if token is not None)]
    if end and tokenizer.eos_token_id is not None and not (completion or prompt).endswith(tokenizer.eos_token):
        ids = [*ids, tokenizer.eos_token_id]
    truncated = max_length is not None and len(ids) > max_length
    ids = ids[:max_length]
    labels = [IGNORED] * min(start, len(ids)) + ids[start:]
    return Encoded(ids, labels, truncated)


def encode_text(tokenizer: Any, text: str, window: int) -> list[Encoded]:
    """Encode a text of any length to measure its likelihood: every token is scored after exactly one start token.

    If the tokenizer adds no start token, BOS (else EOS) is added. A longer text is split into windows that start with
    the last token of the previous window, as in lm-eval's rolling log-likelihood.
    """
    ids = encode(tokenizer, text).ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is not None and ids[0] != first:
        ids = [first, *ids]
    parts = [ids[start : start + window] for start in range(0, max(len(ids) - 1, 1), window - 1)]
    return [Encoded(part, [IGNORED, *part[1:]]) for part in parts]


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without an end token that the tokenizer appends."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "the text contains a lone surrogate, which tokenizers do not accept"
        raise DataError(message, where=cut(text), hint="Remove it from the text.") from error
    ids = token_ids(tokenizer, text)
    # A single end token can also be the start token.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        return ids[:-1]
    return ids


def encode_word(tokenizer: Any, word: str) -> list[int]:
    """Encode a word inside a sentence: with one leading space, without special tokens."""
    bare = token_ids(tokenizer, word, special=False)
    # SentencePiece tokenizers put a space before every text; a second one would be a separate token.
    if bare and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(("▁", "Ġ")):
        return bare
    return token_ids(tokenizer, f" {word}", special=False)


def token_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Tokens of a text, with the special tokens that the tokenizer adds if `special` is true."""
    try:
        # The other results of a tokenizer would take a fifth of the time for thousands of rows.
        encoding = tokenizer(text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)
        ids: list[int] = encoding["input_ids"]
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        # tokenizers raises plain Exception, and tokenizers written in Python can raise anything.
        message = f"the tokenizer fails on `{cut(text)}`: {first_line(error)}"
        where = str(getattr(tokenizer, "name_or_path", "") or "--model")
        raise ModelError(message, where=where, hint="Check its tokenizer.json.") from error
    return ids


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix of two lists of tokens or texts."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def decode_continuation(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Text of `new_ids` after the prompt, with the leading space that decoding `new_ids` alone would lose."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt_ids, *new_ids], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new_ids, skip_special_tokens=True)


def token_text(tokenizer: Any, token_id: int) -> str:
    """Text of one token inside a sentence, with the leading space that decoding it alone can lose."""
    text: str = tokenizer.decode([token_id])
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return f" {text}" if str(piece).startswith("▁") and not text.startswith(" ") else text


def context_length(config: Any, tokenizer: Any) -> int:
    """Largest number of tokens of a model, by its config, else by its tokenizer, else 2,048."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value >= 1:
            # Positions start behind that of the padding token.
            offset = (config.pad_token_id or 0) + 1 if re.search(_OFFSET_POSITIONS, config.model_type) else 0
            return int(value) - offset
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, (int, float)) and 0 < limit < 10**9 else 2048


def pad_right(examples: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (examples, longest), padded on the right."""
    ids, labels = (
        [torch.tensor(row, dtype=torch.long) for row in rows]
        for rows in ([each.ids for each in examples], [each.labels for each in examples])
    )
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, each (prompts, longest), padded on the left for generation."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side="left"),
        "attention_mask": pad_sequence(mask, batch_first=True, padding_side="left"),
    }


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that a lack of memory shows at the start."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def has_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def choose_template(tokenizer: Any, options: object, stored: str | None = None) -> str | None:
    """Set the chat template of a tokenizer, and return it if it is not the tokenizer's own.

    Args:
        options: if they are `ChatSettings`, their template precedes the others, and their arguments are added.
        stored: template of an adapter.

    Raises:
        ConfigError: arguments of a template without a template.
    """
    chosen = stored
    if isinstance(options, ChatSettings) and options.changes_template:
        chosen = options.template_text or stored
        if not (chosen or has_template(tokenizer)):
            where = "--chat-template-kwargs, --system-prompt"
            raise ConfigError("the tokenizer has no chat template", where=where, hint="Give --chat-template FILE.")
        chosen = options.template_defaults + (chosen or tokenizer.get_chat_template())
    if chosen is not None:
        tokenizer.chat_template = chosen
    return chosen


def chat_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Tokens of a chat with `prompt` as the user's turn, up to the generation prompt."""
    # Templates write special tokens themselves.
    return tuple(token_ids(tokenizer, _chat_text(tokenizer, prompt), special=False))


# A text that no template contains.
_CONTENT = "Qx7"


def turn_ends(tokenizer: Any) -> list[str]:
    """Tokens and texts that end an assistant's turn in the chat template: of an answer, and of a tool call.

    An end is the first special token after the content, else the last added token, else the text after an answer.
    """
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": _CONTENT}}}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ends = []
    for turn in ({"content": _CONTENT}, {"content": "", "tool_calls": [call]}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template can raise anything
            continue
        _, content, tail = text.rpartition(_CONTENT)
        ids = token_ids(tokenizer, tail, special=False)
        special = [i for i in ids if i in tokenizer.all_special_ids or (i in added and added[i].special)]
        found = special[:1] or [i for i in ids if i in added][-1:]
        if content and (found or "tool_calls" not in turn):
            ends.append(tokenizer.convert_ids_to_tokens(found[0]) if found else tail.strip())
    return list(dict.fromkeys(filter(None, ends)))


def end_tokens(model: Any, tokenizer: Any, ends: Iterable[str] = ()) -> list[int]:
    """End tokens of the generation config, of the tokenizer, and those of `ends` that are one token."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    ids += [tokenizer.convert_tokens_to_ids(end) for end in ends if is_token(tokenizer, end)]
    return sorted({token for token in ids if token is not None})


def is_token(tokenizer: Any, text: str) -> bool:
    """Return whether `text` is one token of the tokenizer."""
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """Encode the chat of `prompt` and `answer`; only the answer is scored."""
    before = _chat_text(tokenizer, prompt)
    ids = token_ids(tokenizer, before + answer, special=False)
    start = common_length(ids, token_ids(tokenizer, before, special=False))
    return Encoded(ids, [IGNORED] * start + ids[start:])


def _chat_text(tokenizer: Any, prompt: str) -> str:
    turns = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template can raise anything
        message = f"the chat template refuses it: {first_line(error)}"
        raise DataError(message, where=prompt[:60], hint="Use --no-apply-chat-template.") from error
    return text


def encode_chat(
    tokenizer: Any, chat: Chat, where: str, max_length: int | None = None
) -> tuple[list[Encoded], list[str]]:
    """Encode a chat as one example, or as one for each scored turn; also return notes for the user.

    Each scored turn includes the end token that closes it. If the template does not close the last turn with a special
    token, the tokenizer's end token is added.

    Args:
        max_length: keep this many tokens from the front of each example.

    Raises:
        DataError: no template, or turns that the template refuses, leaves out or changes.
    """
    if not has_template(tokenizer):
        hint = "Use a model with a chat template, --chat-template FILE, or rows of prompt and completion."
        raise DataError("the tokenizer has no chat template", where=where, hint=hint)
    forms, failures = [chat.messages], []
    if any("tool_calls" in turn for turn in chat.messages):
        # Some templates accept only null as an empty content, or arguments as JSON text.
        changes = ((None, False), ("", True), (None, True))
        forms += [[_with_tool_calls(turn, *change) for turn in chat.messages] for change in changes]
    for messages in forms:
        try:
            rendered, notes = _render_scored(tokenizer, chat, messages, where)
            break
        except DataError as error:
            failures.append(error)
    else:
        raise failures[0]
    encoded = []
    for text, spans in rendered:
        pieces = _pieces(tokenizer, text, spans)
        ids = [token for piece in pieces for token in piece]
        scored = [index % 2 == 1 for index, piece in enumerate(pieces) for _ in piece]
        ends_with_answer = chat.scored[-1] or (bool(spans) and spans[-1][1] == len(text))
        ids, scored = _with_end_tokens(tokenizer, ids, scored, ends_with_answer)
        truncated = max_length is not None and len(ids) > max_length
        ids, scored = ids[:max_length], scored[:max_length]
        labels = [token if flag else IGNORED for token, flag in zip(ids, scored, strict=True)]
        encoded.append(Encoded(ids, labels, truncated))
    return encoded, notes


def _pieces(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> list[list[int]]:
    """Tokens before, in and after each scored turn.

    The prompt of a turn has the tokens that it has in generation, also if its end and the turn could be one token. But
    some tokenizers add a space to each piece of a text; then such a token belongs to the turn, as in `encode`.
    """
    whole, places = token_ids(tokenizer, text, special=False), [place for span in spans for place in span]
    pieces = [token_ids(tokenizer, text[a:b], special=False) for a, b in pairwise((0, *places, len(text)))]
    joined = [token for piece in pieces for token in piece]
    if joined != whole and tokenizer.decode(joined) != tokenizer.decode(whole):
        lengths = [common_length(whole, token_ids(tokenizer, text[:place], special=False)) for place in places]
        pieces = [whole[a:b] for a, b in pairwise((0, *lengths, len(whole)))]
    return pieces


# A rendered text, with start and end of each scored turn.
_Rendered = tuple[str, list[tuple[int, int]]]
_Render = Callable[[list[dict[str, Any]], bool], str]


def _with_tool_calls(turn: dict[str, Any], empty: str | None, as_text: bool) -> dict[str, Any]:
    """A turn with `empty` in the place of an empty content, and with the arguments of its calls as JSON text."""
    calls = copy.deepcopy(turn.get("tool_calls"))
    for call in calls or () if as_text else ():
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**turn, "content": turn["content"] or empty, "tool_calls": calls} if calls else turn


def _render_scored(
    tokenizer: Any, chat: Chat, messages: list[dict[str, Any]], where: str
) -> tuple[list[_Rendered], list[str]]:
    """Rendered texts of a chat, or of each scored turn; and notes.

    Args:
        messages: a form of those of `chat`.

    Raises:
        DataError: the template leaves out or changes a part of a scored turn.
    """
    from transformers.utils import chat_template_utils

    apply: Any = chat_template_utils.render_jinja_template
    template, special = tokenizer.get_chat_template(tools=chat.tools), tokenizer.special_tokens_map
    options = {"chat_template": template, "return_assistant_tokens_mask": bool(_GENERATION.search(template)), **special}
    marks: list[list[tuple[int, int]]] = []

    # Not `apply_chat_template`, which drops a content of null.
    def render(turns: list[dict[str, Any]], prompt: bool) -> str:
        try:
            result = apply([turns], chat.tools, add_generation_prompt=prompt, **options)
        except _TEMPLATE_ERRORS as error:
            hint = "Fix the row; many templates require alternating turns of user and assistant."
            message = f"the chat template refuses it: {first_line(error)}"
            raise DataError(message, where=where, hint=hint) from error
        marks[:] = result[1]
        return str(result[0][0])

    wanted = [index for index, is_scored in enumerate(chat.scored) if is_scored]
    full = render(messages, False)
    spans = _spans_of_marks(marks[0], chat) if marks else None
    if spans is None:
        spans = _spans_by_prefixes(render, messages, wanted, full)
    rendered = [(full, spans or [])]
    if spans is None:
        rendered = [_render_turn(render, messages, index, where) for index in wanted]
    texts = [text[start:end] for text, spans in rendered for start, end in spans]
    if len(texts) != len(wanted):  # marks need not be turns
        texts = ["".join(texts)] * len(wanted)
    tools = [str(tool.get("function", tool).get("name", "")) for tool in chat.tools or ()]
    missing = [f"tool `{name}`" for name in tools if not all(_contains(text, name) for text, _ in rendered)]
    for index, text in zip(wanted, texts, strict=True):
        if part := _missing_part(chat.messages[index], text):
            missing.append(f"{part} of turn {index + 1}")
    if missing:
        hint = "Use another template (--chat-template FILE), or rows of prompt and completion."
        raise DataError(f"the chat template leaves out the {missing[0]}", where=where, hint=hint)
    notes = [] if spans is not None else ["one example per assistant turn: the chat template changes earlier turns"]
    for turn in chat.messages[: wanted[-1]] if wanted else ():
        if turn["role"] != "assistant" and not _contains(rendered[-1][0], turn["content"]):
            notes.append(f"the chat template leaves out turns of `{turn['role']}`")
    return rendered, notes


def _spans_of_marks(marks: list[tuple[int, int]], chat: Chat) -> list[tuple[int, int]] | None:
    """Marks of the scored turns; None if some turns are not scored, and the marks do not show which."""
    turns = zip(chat.messages, chat.scored, strict=True)
    flags = [is_scored for turn, is_scored in turns if turn["role"] == "assistant"]
    if all(flags):
        return marks
    pairs = zip(marks, flags, strict=False)
    return [mark for mark, is_scored in pairs if is_scored] if len(marks) == len(flags) else None


def _spans_by_prefixes(
    render: _Render, messages: list[dict[str, Any]], wanted: list[int], full: str
) -> list[tuple[int, int]] | None:
    """Spans of the scored turns; None if the chat up to a turn is not a prefix of the full chat."""
    spans = []
    for index in wanted:
        before, after = render(messages[:index], True), render(messages[: index + 1], False)
        if not (after.startswith(before) and full.startswith(after)):
            return None
        spans.append((len(before), len(after)))
    return spans


def _render_turn(render: _Render, messages: list[dict[str, Any]], index: int, where: str) -> _Rendered:
    """The prompt of an assistant turn as in generation, and the turn as its completion."""
    turn, before = messages[index], render(messages[:index], True)
    after = render(messages[: index + 1], False)
    history = common_length(render(messages[:index], False), before)
    start = common_length(before, after)
    if start < len(before):
        # The turn may start with characters of the generation prompt, another text does not.
        other = render([*messages[:index], {"role": "assistant", "content": _CONTENT}], False)
        start = min(start, common_length(before, other))
    if start < history:
        hint = "Use a template with {% generation %} marks, or rows of prompt and completion."
        raise DataError(f"the chat template changes the text before turn {index + 1}", where=where, hint=hint)
    completion = after[start:]
    if start < len(before):
        # The generation prompt opens thoughts, which templates leave out of finished turns, or skips them.
        if "</think>" in before[history:]:
            completion = completion.rpartition("</think>")[2].lstrip()
        elif "<think>" in before[history:] and "</think>" not in completion:
            completion = f"{_thoughts_and_answer(turn)[0]}\n</think>\n\n{completion.lstrip()}"
    return before + completion, [(len(before), len(before) + len(completion))]


def _thoughts_and_answer(turn: dict[str, Any]) -> tuple[str, str]:
    before, _, answer = (turn["content"] or "").rpartition("</think>")
    written = (turn[key] for key in ("reasoning_content", "reasoning", "thinking") if turn.get(key))
    return next(written, before.rpartition("<think>")[2]).strip(), answer.strip()


def _missing_part(turn: dict[str, Any], text: str) -> str | None:
    """Part of an assistant turn that the text does not contain; thoughts can be left out."""
    if not _contains(text, _thoughts_and_answer(turn)[1]):
        return "content"
    for call in turn.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        # Arguments as Python writes them: the template expects JSON text.
        is_python = bool(arguments) and str(arguments) in text
        if is_python or not all(_contains(text, value) for value in (name, *_values(arguments))):
            return f"tool call `{name}`"
    return None


def _values(arguments: Any) -> list[Any]:
    """Keys and values at every depth."""
    if isinstance(arguments, dict):
        return [each for key, value in arguments.items() for each in (key, *_values(value))]
    return [each for value in arguments for each in _values(value)] if isinstance(arguments, list) else [arguments]


def _contains(text: str, value: Any) -> bool:
    """Return True if the text contains a value without outer white space, as it is or as in JSON."""
    if isinstance(value, str):
        value = value.strip()
        return value in text or any(json.dumps(value, ensure_ascii=flag)[1:-1] in text for flag in (False, True))
    return json.dumps(value) in text or str(value) in text


def _with_end_tokens(
    tokenizer: Any, ids: list[int], scored: list[bool], ends_with_answer: bool
) -> tuple[list[int], list[bool]]:
    """Score the end token after each turn; add one after the last turn if it has no closing token."""
    end = tokenizer.eos_token_id
    if end is None:
        return ids, scored
    for index in range(1, len(ids)):
        scored[index] |= scored[index - 1] and ids[index] == end and ids[index - 1] != end
    special = {*tokenizer.all_special_ids, *(getattr(tokenizer, "added_tokens_decoder", None) or {})}
    tail = len(ids)
    while tail and not scored[tail - 1]:
        tail -= 1
    # White space can follow the token that closes the turn.
    last = next((token for token in reversed(ids[:tail]) if tokenizer.decode([token]).strip()), None)
    if ends_with_answer and tail and last not in special:
        if tail < len(ids) and ids[tail] in special:
            return ids, [*scored[:tail], True, *scored[tail + 1 :]]
        # Text of the template after the turn, such as a line break, is dropped.
        return [*ids[:tail], end], [*scored[:tail], True]
    return ids, scored
