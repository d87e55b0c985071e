"""Scored tokens of chats against the tokens that TRL's training templates mark.

Run     python recipes/studies/chat_templates.py --trl trl/trl/chat_templates --tokenizer TOKENIZER
Needs   a copy of TRL's folder of chat templates; any fast tokenizer (special tokens of each template are added)
Shows   one row per family: tokens scored by both, by braces only, by TRL only, and the number of examples

braces gets the published template, TRL's marks come from the training template next to it (`NAME_training.jinja`), or
from the published template if it has marks.
"""

from __future__ import annotations

import argparse
import difflib
import re
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from braces_cli.core.errors import BracesError
from braces_cli.core.models.tokenize import IGNORED, encode_chat
from braces_cli.data.chats import read_chat
from braces_cli.data.rows import CHAT

TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city."}},
            "required": ["city"],
        },
    },
}
SPECIAL = re.compile(
    r"<\|[^|<>'\"\s]+\|>|<\uff5c[^\uff5c]+\uff5c>|<\|\w+>|<\w+\|>|<\|\"\|>|\[gMASK\]|<sop>|\[/?INST\]"
    r"|</?(?:think|tool_\w+|arg_\w+|\w+_of_turn|end_of_utterance|image|fake_token_around_image)>"
)


def turns(*texts: str) -> list[dict[str, Any]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def with_tool(question: str, city: str, result: str, answer: str) -> list[dict[str, Any]]:
    """A question that is answered after a call."""
    user, assistant = turns(question, answer)
    call = {"type": "function", "function": {"name": "lookup_weather", "arguments": {"city": city}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [user, calling, {"role": "tool", "name": "lookup_weather", "content": result}, assistant]


BIRD = turns("Which bird is that?", "A heron, I think.")
OSLO = with_tool("How is the weather in Oslo?", "Oslo", "snow", "It snows in Oslo.")
CASES = {
    "one turn": (BIRD, None),
    "two turns": ([*BIRD, *turns("Is it rare?", "No, it is common here.")], None),
    "one, tools": (OSLO, [TOOL]),
    "two, tools": ([*OSLO, *with_tool("And in Rome?", "Rome", "sun", "The sun shines in Rome.")], [TOOL]),
}


def runs(ids: list[int], flags: list[bool]) -> list[list[int]]:
    """Tokens of each run of true flags."""
    pairs = groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in pair] for flag, pair in pairs if flag]


def compare(tokenizer: Any, published: str, training: str, messages: list[dict[str, Any]], tools: Any) -> str:
    """The cell of one chat."""
    tokenizer.chat_template = training
    try:
        options = {"tools": tools, "return_dict": True, "return_assistant_tokens_mask": True}
        marked = tokenizer.apply_chat_template(messages, **options)
        theirs = runs(marked["input_ids"], [bool(flag) for flag in marked["assistant_masks"]])
    except Exception:  # a template can raise anything
        theirs = []
    tokenizer.chat_template = published
    try:
        examples, _ = encode_chat(tokenizer, read_chat(CHAT, {"messages": messages, "tools": tools}, "row"), "row")
    except BracesError as error:
        return "both refuse" if not theirs else f"refused: {error.message.partition(' the ')[2]}"
    ours = [run for each in examples for run in runs(each.ids, [label != IGNORED for label in each.labels])]
    split = f", {len(examples)} examples" if len(examples) > 1 else ""
    if ours == theirs:
        return f"equal ({sum(map(len, ours))}){split}"
    one, other = list(chain(*ours)), list(chain(*theirs))
    blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    both = sum(block.size for block in blocks)
    return f"{both}, +{len(one) - both}, -{len(other) - both}{split}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    args = parser.parse_args()
    print("|", " | ".join(["template", *CASES]), "|\n" + "|---" * (len(CASES) + 1) + "|")
    for file in sorted(args.trl.glob("*.jinja")):
        published = file.read_text(encoding="utf-8")
        marked = file.with_name(f"{file.stem}_training.jinja")
        training = marked.read_text(encoding="utf-8") if marked.exists() else published
        if file.stem.endswith("_training") or "generation %}" not in training.replace("-%}", "%}"):
            continue
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
        tokenizer.add_tokens(sorted(set(SPECIAL.findall(published))), special_tokens=True)
        cells = [compare(tokenizer, published, training, *case) for case in CASES.values()]
        print("|", " | ".join([file.stem, *cells]), "|")


if __name__ == "__main__":
    main()
