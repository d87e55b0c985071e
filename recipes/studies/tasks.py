"""Tasks of the comparison: rows for training, validation and test, and the scores of an open model.

sst5-text    reviews as plain texts; loss
triviaqa     questions with answers, half of them for training; loss and exact match on the other half
sst5-labels  the label of a review as one of five choices; loss and accuracy
boolq        questions without a passage, answered by true or false; loss and accuracy
chats        questions and answers built from the templates below, in a style that a rule checks; loss and the share
             of answers to unseen questions that follow every rule of the style

The loss is the mean over scored tokens, the end token included, as in `braces train`.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.options import Sampling
from braces_cli.scoring.likelihood import continuation_likelihoods
from braces_cli.steering.texts import generate_texts, text_requests

# Training rows that no run trains on.
VALIDATION = 200
# Test rows of the chats, whose answers take long to generate.
CHATS = 200
# Sequences per forward pass.
BATCH = 32


@dataclass(frozen=True)
class Example:
    """A row in a format of `braces train`, and the reference of its score."""

    row: dict[str, Any]
    gold: Any = None


Lines = tuple[str, str, str, str]
Score = Callable[[Session, Sequence[Example]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """Rows and score of a task.

    Attributes:
        score: metrics other than the loss, of an open model on test rows.
        labels: choices of a task with choices.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    score: Score
    labels: tuple[str, ...] = ()

    def constants(self) -> dict[str, float]:
        """Return the accuracy of a random choice, and of always choosing the most frequent label of the training."""
        if not self.labels:
            return {}
        majority = Counter(example.gold for example in self.train).most_common(1)[0][0]
        return {"chance": 1 / len(self.labels), "majority": mean(example.gold == majority for example in self.test)}


def split(rows: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the rows for training and for validation, drawn at random: SST-5 is sorted by length."""
    drawn = random.Random(0).sample(rows, len(rows))
    count = min(VALIDATION, len(rows) // 4)
    return drawn[count:], drawn[:count]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def continued(session: Session, prompts: Sequence[str], tokens: int, chat: bool = False) -> list[str]:
    """Return greedy continuations; of plain prompts the first line only."""
    sampling = Sampling(tokens, temperature=0.0, stop=() if chat else ("\n\n", "\nQuestion:"))
    return list(generate_texts(session, text_requests(prompts), sampling, batch_size=BATCH, chat=chat))


# SST-5 as text


def sst5_text(data: Path, chat: bool) -> Task:
    def examples(name: str) -> list[Example]:
        return [Example({"text": row["text"]}) for row in read_jsonl(data / "sst5" / f"{name}.jsonl")]

    return Task(*split(examples("train")), examples("dev"), lambda session, examples: {})


# TriviaQA


def triviaqa(data: Path, chat: bool) -> Task:
    examples = []
    for row in read_jsonl(data / "triviaqa" / "validation.jsonl"):
        answer = row["answer"]
        pair = {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {answer['value']}"}
        aliases = {normalised(alias) for alias in (answer["value"], *answer["aliases"])}
        examples.append(Example(pair, aliases))
    return Task(*split(examples[::2]), examples[1::2], exact_match)


def exact_match(session: Session, examples: Sequence[Example]) -> dict[str, float]:
    answers = continued(session, [example.row["prompt"] for example in examples], 16)
    right = (
        normalised(answer.strip().split("\n")[0]) in example.gold
        for answer, example in zip(answers, examples, strict=True)
    )
    return {"exact_match": mean(right)}


def normalised(text: str) -> str:
    """Return the words in lower case, without punctuation and articles, as TriviaQA's own evaluation does."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


# Choices


def sst5_labels(data: Path, chat: bool) -> Task:
    labels = ("very negative", "negative", "neutral", "positive", "very positive")

    def examples(name: str) -> list[Example]:
        rows = read_jsonl(data / "sst5" / f"{name}.jsonl")
        return [choice(f"Review: {row['text']}\nSentiment:", row["label"]) for row in rows]

    return Task(*split(examples("train")), examples("dev"), partial(accuracy, labels), labels)


def boolq(data: Path, chat: bool) -> Task:
    labels = ("true", "false")

    def examples(name: str) -> list[Example]:
        rows = read_jsonl(data / "commonsense" / "boolq" / f"{name}.jsonl")
        # The question inside an instruction of LLM-Adapters.
        questions = [row["instruction"].partition("question: ")[2].partition("\n")[0] for row in rows]
        prompts = [f"Question: {question}\nTrue or false:" for question in questions]
        return [choice(prompt, row["answer"]) for prompt, row in zip(prompts, rows, strict=True)]

    return Task(*split(examples("train")), examples("test"), partial(accuracy, labels), labels)


def choice(prompt: str, label: str) -> Example:
    return Example({"prompt": prompt, "completion": f" {label}"}, label)


def accuracy(labels: Sequence[str], session: Session, examples: Sequence[Example]) -> dict[str, float]:
    """Choose the label with the largest probability."""
    pairs = [(example.row["prompt"], f" {label}") for example in examples for label in labels]
    nll = [each.nll for each in continuation_likelihoods(session.base, pairs, BATCH)]
    of_rows = zip(*(nll[index :: len(labels)] for index in range(len(labels))), strict=True)
    chosen = [labels[of_row.index(min(of_row))] for of_row in of_rows]
    return {"accuracy": mean(label == example.gold for label, example in zip(chosen, examples, strict=True))}


# Chats
#
# A question is about two things. An answer has a line that names them in reverse order, two numbered lines, and a
# last line if and only if the user says thank you; all in lower case. Things, wordings and two of the actions of the
# test are not in the training rows.

THINGS = (
    "bread knife", "garden hose", "wool blanket", "desk lamp", "rain coat", "bicycle", "kettle", "guitar",
    "camping tent", "oak table", "picture frame", "leather bag", "toolbox", "wine glass", "sun hat", "rope", "ladder",
    "alarm clock", "paint brush", "rubber boot", "fishing rod", "mirror", "umbrella", "cookbook", "hammer",
    "window blind", "sleeping bag", "chess board", "teapot", "wooden spoon", "suitcase", "violin", "flower pot",
    "dining chair", "bed sheet", "pencil case", "cake tin", "snow shovel", "wall map", "lantern",
)  # fmt: skip
TEST_THINGS = (
    "folding chair", "copper pot", "kite", "cotton shirt", "camera", "garden bench", "paper lamp", "drum", "backpack",
    "glass jar", "rake", "notebook", "curtain", "wall clock", "saddle", "candle holder", "scarf", "bookshelf",
)  # fmt: skip
# Action -> two possible first lines, and two possible second lines.
ACTIONS = {
    "clean": ("wipe {} with a damp cloth", "brush the dust off {}", "let it dry", "use very little soap"),
    "store": ("keep {} in a dry place", "put {} on a shelf", "cover it with a sheet", "note where you put it"),
    "repair": ("find the broken part of {}", "take {} apart", "use glue if a screw does not fit", "test it"),
    "choose": ("hold {} in your hands", "compare {} with a cheaper one", "ask how long it lasts", "take time"),
    "carry": ("hold {} close to your body", "wrap {} in paper", "rest after a few steps", "ask a friend"),
    "sell": ("take a picture of {}", "say how old {} is", "name a fair price", "meet in a public place"),
}
TEST_ACTIONS = {
    "wrap": ("put {} on the paper", "find a box for {}", "close it with tape", "fold the corners inwards"),
    "draw": ("begin with the outline of {}", "look at {}", "add the shadows last", "use a soft pencil"),
}
WORDINGS = (
    "How do I {action} {things}?", "What is a good way to {action} {things}?", "I want to {action} {things}.",
    "Can you help me to {action} {things}?",
)  # fmt: skip
TEST_WORDINGS = ("Tell me how to {action} {things}.", "Is it hard to {action} {things}? What should I do?")
THANKS, REPLY = " Thank you!", "you are welcome."


@dataclass(frozen=True)
class Question:
    """A question about two things, with or without thanks."""

    text: str
    things: tuple[str, str]
    thanked: bool

    @property
    def names(self) -> str:
        """First line of the answer."""
        return f"about: {', '.join(reversed(self.things))}"


def chats(data: Path, chat: bool) -> Task:
    """Build the chats; without a chat template they are prompts and completions."""
    chosen = random.Random(0)
    train = build_chats(chosen, THINGS[:-8], WORDINGS, ACTIONS, chat)
    validation = build_chats(chosen, THINGS[-8:], WORDINGS, ACTIONS, chat)
    test = build_chats(chosen, TEST_THINGS, TEST_WORDINGS, ACTIONS | TEST_ACTIONS, chat)
    return Task(train, validation[:VALIDATION], test[:CHATS], partial(style, chat))


def build_chats(
    chosen: random.Random, things: Sequence[str], wordings: Sequence[str], actions: Mapping[str, Lines], chat: bool
) -> list[Example]:
    """Build one chat for each thing, wording and action, with and without thanks."""
    examples = []
    for thing, wording, action, thanked in product(things, wordings, actions, (False, True)):
        other = chosen.choice([each for each in things if each != thing])
        text = wording.format(action=action, things=f"the {thing} and the {other}")
        question = Question(text + THANKS * thanked, (thing, other), thanked)
        first, second = chosen.choice(actions[action][:2]), chosen.choice(actions[action][2:])
        advice = first.format(f"the {other}")
        lines = [question.names, f"1) {advice}.", f"2) {second}.", *([REPLY] if thanked else [])]
        answer = "\n".join(lines)
        row: dict[str, Any] = {"prompt": f"{question.text}\n", "completion": answer}
        if chat:
            turns = (("user", question.text), ("assistant", answer))
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        examples.append(Example(row, question))
    chosen.shuffle(examples)
    return examples


def style(chat: bool, session: Session, examples: Sequence[Example]) -> dict[str, float]:
    """Return the share of answers that follow every rule, and the share for each rule."""
    prompts = [example.gold.text if chat else example.row["prompt"] for example in examples]
    answers = continued(session, prompts, 64, chat)
    followed = [rules(answer, example.gold) for answer, example in zip(answers, examples, strict=True)]
    shares = {f"style_{name}": mean(each[name] for each in followed) for name in followed[0]}
    return {"style": mean(all(each.values()) for each in followed), **shares}


def rules(answer: str, question: Question) -> dict[str, bool]:
    """Rules of the style -> True if the answer follows the rule."""
    lines = answer.strip().split("\n")
    body = lines[1:-1] if question.thanked else lines[1:]
    return {
        "names": lines[0] == question.names,
        "numbers": len(body) == 2 and all(re.match(rf"{k}\) \S", line) for k, line in enumerate(body, 1)),
        "lower": answer == answer.lower(),
        "thanks": (lines[-1] == REPLY) == question.thanked,
    }


# Task -> (data folder, whether the base has a chat template) -> its rows and score.
TASKS: dict[str, Callable[[Path, bool], Task]] = {
    "sst5-text": sst5_text, "triviaqa": triviaqa, "sst5-labels": sst5_labels, "boolq": boolq, "chats": chats,
}  # fmt: skip
