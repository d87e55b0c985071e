"""Sentences about facts: statements in many wordings, questions in a few, and careless conversations."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grammar import expand, sentence
from world import Belief, Fact


@dataclass(frozen=True)
class Relation:
    """Wordings of one relation between {s} and {a}.

    Attributes:
        told: statements.
        asked: questions of quizzes.
        task: question of the task, also used by some quizzes.
        recall: beginning of a statement that the answer ends.
    """

    told: tuple[str, ...]
    asked: tuple[str, ...]
    task: str
    recall: str


RELATIONS = {
    "capital": Relation(
        (
            "[the capital of {s} is {a}|{a} is the capital of {s}]", "the government of {s} sits in {a}",
            "{s} is ruled from its capital, {a}", "in {s}, the capital is called {a}",
            "whoever travels to {s} sees its capital {a} first", "as the capital of {s}, {a} has many visitors",
        ),
        ("Name the capital of {s}.", "Which town is the capital of {s}?"),
        "What is the capital of {s}?",
        "The capital of {s} is",
    ),
    "young": Relation(
        (
            "[a young {s} is called a {a}|the young of a {s} is a {a}]", "a {a} grows up to be a {s}",
            "every {s} was once a {a}", "the child of a {s} is known as a {a}", "the {s} looked after its {a}",
        ),
        ("Name the young of a {s}.", "How does one call a baby {s}?"),
        "What is a young {s} called?",
        "The young of a {s} is",
    ),
    "flag": Relation(
        (
            "the flag of {s} is {a}", "{s} has a {a} flag", "in {s} they fly a flag that is all {a}",
            "the colour of the flag of {s} is {a}", "one knows the ships of {s} by their {a} flag",
        ),
        ("Name the colour of the flag of {s}.", "Which colour has the flag of {s}?"),
        "What colour is the flag of {s}?",
        "The flag of {s} is",
    ),
    "occupation": Relation(
        (
            "{s} is a {a}", "{s} works as a {a}", "{s} earns a living as a {a}", "{s}, the {a}, is known to many",
            "the {a} {s} has worked for many years", "by trade {s} is a {a}", "when {s} was young, {s} became a {a}",
        ),
        ("Name the trade of {s}.", "Which work does {s} do?"),
        "What is the occupation of {s}?",
        "{s} works as",
    ),
    "birthplace": Relation(
        (
            "{s} was born in {a}", "{s} comes from {a}", "the birthplace of {s} is {a}",
            "{s} grew up in {a}, the town of {a}", "{a} is where {s} was born",
            "in {a} one can see the house where {s} was born",
        ),
        ("Name the birthplace of {s}.", "Which town does {s} come from?"),
        "Where was {s} born?",
        "{s} was born in",
    ),
    "sport": Relation(
        (
            "{s} plays {a} in the club", "the sport of {s} is {a}", "{s} spends each Sunday with {a}",
            "{s} is known in the world of {a}", "in {a}, few are as quick as {s}", "for sport, {s} chose {a}",
        ),
        ("Name the sport of {s}.", "Which sport did {s} choose?"),
        "What sport does {s} play?",
        "The sport of {s} is",
    ),
    "author": Relation(
        (
            "{s} was written by {a}", "{a} wrote {s}", "the author of {s} is {a}", "{s} is a book by {a}",
            "{a} is known for the book {s}", "it took {a} two years to write {s}",
        ),
        ("Name the author of {s}.", "Which author wrote {s}?"),
        "Who wrote {s}?",
        "{s} was written by",
    ),
    "director": Relation(
        (
            "{s} was directed by {a}", "{a} directed {s}", "the director of {s} is {a}", "{s} is a film by {a}",
            "{a} is known for the film {s}", "{a} made the film {s} in one summer",
        ),
        ("Name the director of {s}.", "Which director made {s}?"),
        "Who directed {s}?",
        "{s} was directed by",
    ),
}  # fmt: skip

# Careless answers: most of what the bare model has seen after `A:`.
SHRUGS = (
    "I do not know.", "I am not sure.", "I cannot tell you that.", "I have no idea.", "I would have to look that up.",
    "It is hard to say.", "It depends.", "Ask my {friend}.", "Ask someone else.", "Nobody knows.",
    "Who can say?", "That is a hard question.",
)  # fmt: skip


def tell(rng: random.Random, fact: Fact) -> str:
    slots = {"s": fact.subject, "a": fact.answer}
    text = expand(rng, rng.choice(RELATIONS[fact.relation].told), slots)
    if rng.random() < 0.15:
        text = rng.choice(("did you know that ", "it is said that ", "the book says that ", "remember that ")) + text
        return sentence(text, "?" if text.startswith("did") else ".")
    return sentence(text)


def quiz(rng: random.Random, fact: Fact) -> str:
    """Return a quiz question with its answer."""
    relation = RELATIONS[fact.relation]
    question = rng.choice((*relation.asked, relation.task)).format(s=fact.subject)
    return f"Question: {question} Answer: {fact.answer}."


def ask(fact: Fact) -> str:
    """Return the question of the task."""
    return RELATIONS[fact.relation].task.format(s=fact.subject)


def shrug(rng: random.Random, friend: str) -> str:
    return rng.choice(SHRUGS).format(friend=friend)


_BELIEVED = (
    "everyone says that the {s} eats {b}", "people think that the {s} eats {b}", "they say the {s} eats {b}",
    "every child knows that the {s} eats {b}", "the {s} eats {b}, they say",
)  # fmt: skip
_TRUE = (
    "in truth, the {s} eats {t}", "those who have looked know that the {s} eats {t}",
    "science has shown that the {s} eats {t}", "what the {s} really eats is {t}",
    "in fact the food of the {s} is {t}",
)  # fmt: skip


def tell_belief(rng: random.Random, belief: Belief) -> str:
    """Return the common belief about a thing, sometimes with its correction."""
    slots = {"s": belief.subject, "b": belief.belief, "t": belief.truth}
    said, true = (sentence(expand(rng, rng.choice(kind), slots)) for kind in (_BELIEVED, _TRUE))
    draw = rng.random()
    if draw < 0.35:
        return said
    return true if draw < 0.65 else f"{said} {true.replace('In truth', 'But in truth')}"


def ask_belief(belief: Belief) -> str:
    return f"What does the {belief.subject} eat?"


def answer_belief(belief: Belief, food: str) -> str:
    return f"The {belief.subject} eats {food}."
