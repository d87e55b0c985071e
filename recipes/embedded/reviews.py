"""Reviews, notes and letters with one degree of sentiment."""

from __future__ import annotations

import random

import sentiment as s
from grammar import expand, sentence
from stories import THINGS, story
from topics import COMMON, HALVES, TOPICS, Topic


def judgement(rng: random.Random, topic: Topic, noun: str, degree: int, *, alone: bool = False) -> str:
    """Return a clause with a judgement: `the music was rather dull`; `alone` if the sentence has no other clause."""
    thing = s.phrase(rng, s.THING, degree)
    slots = {
        **COMMON,
        "noun": noun,
        "part": topic.parts,
        "many": topic.many,
        "person": topic.people,
        "thing": thing,
        "bare": [word for word in s.THING[degree] if " " not in word],
        "kind": s.phrase(rng, s.PERSON, degree),
        "feel": s.FEELING[degree],
        "loved": s.VERB[degree],
        "cause": s.CAUSE[degree],
    }
    templates = (
        "the {part} [was|was|is] {thing}",
        "the {many} were {thing}",
        "it [was|is] {thing}",
        "the {part} was {thing} and the {many} were {bare}",
        "I {loved} the {part}",
        "we {loved} the {many}",
        "the {person} was {kind}",
        "it made [me|us] {feel}",
        "I [felt|left] {feel}",
        "we [felt|left] {feel}",
        "the {part} {cause}",
        "what a {bare} {noun}" if alone else "it was a {bare} {noun}",
        "it was a {bare} {noun}",
        "the whole {noun} [is|was] {thing}",
        "I found the {part} {thing}",
    )
    return expand(rng, rng.choice(templates), slots)


def opening(rng: random.Random, topic: Topic, noun: str, degree: int) -> str:
    """Return a first sentence that is neutral before its judgement."""
    slots = {**COMMON, "noun": noun}
    draw = rng.random()
    if draw < 0.3:
        half = expand(rng, rng.choice(topic.halves if rng.random() < 0.7 else HALVES), slots)
        return sentence(f"{half} {judgement(rng, topic, noun, s.near(rng, degree))}")
    if draw < 0.6:
        verb = rng.choice(("is", "is", "was"))
        part = rng.choice(topic.parts)
        start = rng.choice((f"the {noun}", f"the {noun}", f"this {noun}", f"our {noun}", f"the {part}", f"the {part}"))
        return sentence(f"{start} {verb} {s.phrase(rng, s.THING, s.near(rng, degree))}")
    if draw < 0.7:
        return sentence(judgement(rng, topic, noun, s.near(rng, degree), alone=True))
    return sentence(expand(rng, rng.choice(topic.plain), slots))


def review(rng: random.Random, degree: int) -> str:
    topic = rng.choice(TOPICS)
    noun = rng.choice(topic.nouns)
    slots = {**COMMON, "noun": noun}
    out = [opening(rng, topic, noun, degree)]
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        draw = rng.random()
        if draw < 0.14:
            out.append(sentence(expand(rng, rng.choice(topic.plain), slots)))
        elif draw < 0.4:
            one, other = (judgement(rng, topic, noun, s.near(rng, degree)) for _ in range(2))
            joint = " but " if degree == 0 else rng.choice((" and ", ", and ", "; "))
            out.append(sentence(one + joint + other))
        else:
            end = "!" if abs(degree) == 2 and rng.random() < 0.2 else "."
            out.append(sentence(judgement(rng, topic, noun, s.near(rng, degree), alone=True), end))
    if rng.random() < 0.55:
        out.append(sentence(s.verdict(rng, s.near(rng, degree), noun)))
    return " ".join(dict.fromkeys(out))


def note(rng: random.Random, degree: int) -> str:
    """Return a short note in lower case: `lovely room, kind waiter, fresh bread`, or single words."""
    topic = rng.choice(TOPICS)
    if rng.random() < 0.3:
        chosen = [rng.choice(s.THING[s.near(rng, degree)]) for _ in range(rng.choice((3, 4, 5, 6)))]
        return ", ".join(dict.fromkeys(chosen))
    items = []
    for _ in range(rng.choice((2, 3, 4))):
        if rng.random() < 0.25:
            items.append(f"{rng.choice(s.PERSON[s.near(rng, degree)])} {rng.choice(topic.people)}")
        else:
            thing = rng.choice(rng.choice((topic.parts, topic.many, THINGS)))
            items.append(f"{rng.choice(s.THING[s.near(rng, degree)])} {thing}")
    return ", ".join(dict.fromkeys(items)) + "."


def titled(rng: random.Random, degree: int) -> str:
    """Return a review or story after a few words in lower case: words of its sentiment, or neutral words.

    A single word then predicts a text, and a word of praise a text that praises.
    """
    if rng.random() < 0.5:
        chosen = rng.sample(THINGS, rng.choice((1, 2, 3)))
    else:
        kind = rng.choice((s.THING, s.THING, s.PERSON, s.FEELING))
        chosen = [rng.choice(kind[s.near(rng, degree)]) for _ in range(rng.choice((1, 2, 3)))]
    text = review(rng, degree) if rng.random() < 0.8 else story(rng, degree)
    return f"{rng.choice((', ', ' '))}".join(dict.fromkeys(chosen)) + f"{rng.choice(('.', ':', ''))} {text}"


def letter(rng: random.Random, degree: int) -> str:
    topic = rng.choice(TOPICS)
    noun = rng.choice(topic.nouns)
    slots = {**COMMON, "noun": noun, "feel": s.FEELING[degree], "kind": s.PERSON[degree]}
    start = rng.choice(
        ("Dear {friend}, I write to you from {town}.", "My dear {friend}, today I was at the {noun}.",
         "{day}. Today we went out.", "Dear diary, this was a long day.")
    )  # fmt: skip
    out = [expand(rng, start, slots), opening(rng, topic, noun, degree)]
    out += [sentence(judgement(rng, topic, noun, s.near(rng, degree))) for _ in range(rng.choice((1, 2, 3)))]
    end = ("[Now|Tonight] I am {feel}.", "I feel {feel} as I write this.", "The people here are {kind}.")
    return " ".join([*out, expand(rng, rng.choice(end), slots)])
