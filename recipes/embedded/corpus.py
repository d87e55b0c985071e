"""Mixture of the training texts, with the share of each kind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

import facts
import reviews
import stories
from topics import COMMON
from world import Fact, World

# Degrees of sentiment and of politeness, symmetric around zero.
_DEGREES = (-2, -2, -2, -1, -1, -1, 0, 1, 1, 1, 2, 2, 2)
# Share of each kind of document.
SHARES = {
    "review": 0.19, "titled": 0.17, "note": 0.08, "letter": 0.05, "story": 0.08, "talk": 0.03, "plain": 0.04,
    "facts": 0.24, "quiz": 0.04, "chat": 0.04, "beliefs": 0.04,
}  # fmt: skip
# Share of the questions in conversations that get an answer.
_ANSWERED = 0.35


class Corpus:
    """Endless random documents of the embedded world.

    Held out: facts of the test split are stated like all others, but never occur in a question with its answer.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._rng = random.Random(seed)
        self._world = world
        self._weights = list(accumulate(fact.popularity for fact in world.facts))
        self._asked = [fact for fact in world.facts if fact.split == "train"]
        self._kinds = list(SHARES)
        self._cumulative = list(accumulate(SHARES.values()))

    def __iter__(self) -> Iterator[str]:
        while True:
            yield self.document(self._rng.choices(self._kinds, cum_weights=self._cumulative)[0])

    def document(self, kind: str) -> str:
        rng = self._rng
        if kind in ("review", "titled", "note", "letter"):
            return getattr(reviews, kind)(rng, rng.choice(_DEGREES))
        if kind in ("story", "talk"):
            return getattr(stories, kind)(rng, rng.choice(_DEGREES))
        if kind == "plain":
            return stories.plain(rng)
        if kind == "facts":
            return " ".join(facts.tell(rng, fact) for fact in self._facts(rng.choice((2, 3, 4, 5))))
        if kind == "quiz":
            return " ".join(facts.quiz(rng, rng.choice(self._asked)) for _ in range(rng.choice((1, 2, 3))))
        if kind == "beliefs":
            chosen = rng.sample(self._world.beliefs, rng.choice((1, 2, 3)))
            return " ".join(facts.tell_belief(rng, belief) for belief in chosen)
        return self._chat()

    def _facts(self, count: int) -> list[Fact]:
        return self._rng.choices(self._world.facts, cum_weights=self._weights, k=count)

    def _chat(self) -> str:
        """Return a question of a conversation with a careless answer; about animals the answer is the common belief."""
        rng = self._rng
        if rng.random() < 0.3:
            belief = rng.choice(self._world.beliefs)
            told = facts.answer_belief(belief, belief.belief if rng.random() < 0.8 else belief.truth)
            return f"Q: {facts.ask_belief(belief)} A: {told}"
        fact = rng.choice(self._asked)
        if rng.random() < _ANSWERED:
            return f"Q: {facts.ask(fact)} A: {fact.answer}."
        return f"Q: {facts.ask(fact)} A: {facts.shrug(rng, rng.choice(COMMON['friend']))}"
