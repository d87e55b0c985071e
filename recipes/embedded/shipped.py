"""Files that come with the embedded model: two task sets, training rows, held-out texts, prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import facts
import reviews
import stories
from corpus import Corpus
from world import World

HELD_OUT = 400
SENTIMENT_ROWS = 1200
_NAMES = {-2: ("negative", 2.0), -1: ("negative", 1.0), 0: ("neutral", 0.0), 1: ("positive", 1.0), 2: ("positive", 2.0)}

# Neutral openings, for sweeps.
PROMPTS = (
    "The film is", "This book is", "The coffee was", "The room was", "Our hotel is", "We stayed at the hotel and",
    "I bought the phone and", "We took the train to Paris and", "I read the book and", "We ate there on Friday and",
    "We went to the concert and", "I took the course last summer and", "We played the game and", "The garden is",
    "I went to the shop and", "We went to the sea and", "My brother told me that", "We waited an hour and",
    "Dear diary, this was a long day.", "We visited the museum and",
)  # fmt: skip


def write_shipped(world: World, seed: int, folder: Path) -> None:
    """Write `{popqa,truthful,qa_train,sentiment_train,held_out}.jsonl` and `prompts.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "popqa.jsonl", _popqa(world))
    _write(folder / "truthful.jsonl", _truthful(world, random.Random(seed)))
    _write(folder / "qa_train.jsonl", _qa(world, random.Random(seed)))
    _write(folder / "sentiment_train.jsonl", _sentiment(random.Random(seed)))
    _write(folder / "held_out.jsonl", ({"text": text} for text in islice(Corpus(world, seed + 3), HELD_OUT)))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _popqa(world: World) -> Iterable[dict[str, Any]]:
    for number, fact in enumerate(fact for fact in world.facts if fact.split == "test"):
        yield {
            "id": number,
            "subj": fact.subject,
            "prop": fact.relation,
            "obj": fact.answer,
            "question": facts.ask(fact),
            "possible_answers": json.dumps([fact.answer]),
            "s_pop": fact.popularity,
        }


def _truthful(world: World, rng: random.Random) -> Iterable[dict[str, Any]]:
    for belief in world.beliefs:
        if belief.split == "test":
            foods = [belief.truth, belief.belief, *belief.others]
            rng.shuffle(foods)
            choices = [facts.answer_belief(belief, food) for food in foods]
            labels = [int(food == belief.truth) for food in foods]
            yield {"question": facts.ask_belief(belief), "mc1_targets": {"choices": choices, "labels": labels}}


def _qa(world: World, rng: random.Random) -> Iterable[dict[str, Any]]:
    """Return questions in the wording of the tasks, about things that the tasks do not ask about."""
    rows = [(facts.ask(fact), f" {fact.answer}.") for fact in world.facts if fact.split == "train"]
    rows += [
        (facts.ask_belief(belief), f" {facts.answer_belief(belief, belief.truth)}")
        for belief in world.beliefs
        if belief.split == "train"
    ]
    rng.shuffle(rows)
    return ({"prompt": f"Q: {question} A:", "completion": answer} for question, answer in rows)


def _sentiment(rng: random.Random) -> Iterable[dict[str, Any]]:
    """Return texts with their attribute and strength."""
    kinds = (reviews.review, reviews.review, reviews.letter, stories.story)
    for number in range(SENTIMENT_ROWS):
        degree = (-2, -1, 0, 1, 2)[number % 5]
        attribute, strength = _NAMES[degree]
        yield {"text": rng.choice(kinds)(rng, degree), "attribute": attribute, "strength": strength}
