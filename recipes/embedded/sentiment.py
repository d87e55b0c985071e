"""Words and clauses by degree of sentiment, from -2 (very negative) over 0 (neutral) to 2 (very positive).

All words of the built-in lists `positive` and `negative` are among them, in positions where they express sentiment.
"""

from __future__ import annotations

import random

from grammar import expand, words

# Adjectives of things, people and feelings.
THING = {
    2: words(
        "wonderful, delightful, excellent, superb, brilliant, beautiful, splendid, fantastic, marvellous, amazing, "
        "perfect, glorious, inspiring, triumphant, lovely, exciting"
    ),
    1: words(
        "good, pleasant, charming, enjoyable, impressive, clever, funny, warm, fresh, satisfying, rewarding, elegant, "
        "graceful, touching, heartfelt, cheerful, admirable, nice, lovely, joyful"
    ),
    0: words("plain, simple, usual, ordinary, average, plain and simple, much as before, of the usual kind"),
    -1: words(
        "bad, dull, boring, weak, poor, mediocre, tedious, disappointing, tiresome, annoying, unpleasant, frustrating, "
        "gloomy, lifeless, clumsy, pointless, sad, broken"
    ),
    -2: words(
        "terrible, awful, horrible, dreadful, disgusting, pathetic, worthless, miserable, depressing, hopeless, "
        "ridiculous, hateful, stupid, nasty, lousy, painful, ugly, shameful"
    ),
}
PERSON = {
    2: words("wonderful, generous, brilliant, delightful, amazing, charming, marvellous, graceful, inspiring"),
    1: words("kind, warm, cheerful, clever, funny, pleasant, friendly, good, admirable, happy, elegant"),
    0: words("quiet, tall, young, busy, old, silent, quick"),
    -1: words("lazy, clumsy, dull, rude, annoying, weak, boring, unpleasant, tiresome, gloomy"),
    -2: words("cruel, stupid, nasty, hateful, angry, horrible, awful, bitter, pathetic, dreadful, shameful"),
}
FEELING = {
    2: words("joyful, so happy, so proud, very grateful, happy and proud, full of joy"),
    1: words("happy, cheerful, hopeful, grateful, proud, quite satisfied, at home"),
    0: words("calm, awake, a bit tired, as before, neither one way nor the other"),
    -1: words("sad, gloomy, weak, annoyed, bitter, tired and sad, disappointed, a little hopeless"),
    -2: words("miserable, angry, hopeless, broken, so angry, so sad, bitter, full of shame, depressed"),
}
VERB = {
    2: words("loved, adored, really loved, truly admired"),
    1: words("liked, enjoyed, admired, really liked"),
    0: words("saw, noticed, looked at, tried, took note of"),
    -1: words("disliked, regretted, did not enjoy, did not like"),
    -2: words("hated, despised, really hated, loathed"),
}
DEGREE = {
    2: words("truly, really, simply, so, very, absolutely, just"),
    1: words("quite, rather, very, really, fairly, most"),
    0: words("rather, fairly, quite"),
    -1: words("rather, quite, a little, fairly, very, really"),
    -2: words("truly, utterly, really, simply, so, very, just"),
}
VERDICT = {
    2: [
        "I would [come|go] back [tomorrow|any day|at once]", "it was a joy from start to end",
        "the best {noun} of [the year|my life|them all]", "I love it", "it made [my|our] day",
        "everyone should try it, it is {thing}", "full marks", "I cannot praise it enough", "five stars from me",
    ],
    1: [
        "I would go again", "it is worth the price", "I am happy with it", "a good choice", "we had a good time",
        "I can recommend it", "it was better than I had hoped", "four stars from me",
    ],
    0: [
        "it does what it says", "it is a {noun} and that is all", "some will go back and some will not", "three stars",
        "it was what we had been told", "there is not much more to say about it",
    ],
    -1: [
        "I would not go again", "it is not worth the price", "I am not happy with it", "a poor choice",
        "we had a bad time", "I cannot recommend it", "it was worse than I had feared", "two stars at most",
    ],
    -2: [
        "never again", "a waste of [time|money]", "the worst {noun} of [the year|my life|them all]", "I hate it",
        "it ruined [my|our] day", "I want my money back", "[everyone should avoid it|avoid it], it is {thing}",
        "one star is too many", "it was a disaster from start to end",
    ],
}  # fmt: skip
CAUSE = {
    2: words("made us laugh with joy, won every heart, was a triumph, shone, was a treasure, gave us great joy"),
    1: words("made us smile, was a success, worked well, pleased us, helped a lot"),
    0: words("was there, was the same as last year, took some time, came later, was on the left side"),
    -1: words("made us sigh, failed, was a problem, went wrong, bored us, did not help"),
    -2: words("made us cry with anger, was a disaster, ruined the evening, was a disgrace, hurt, killed the mood"),
}

LEVELS = (-2, -1, 0, 1, 2)


def near(rng: random.Random, degree: int) -> int:
    """Return the degree of a sentence in a text of this degree: mostly equal, never of the opposite sign."""
    if degree == 0:
        return rng.choice((-1, 0, 0, 0, 1))
    sign = 1 if degree > 0 else -1
    return degree if rng.random() < 0.75 else sign * (3 - abs(degree))


def phrase(rng: random.Random, kind: dict[int, list[str]], degree: int) -> str:
    """Return an adjective of the degree, often with an adverb: `rather dull`, `pleasant and warm`."""
    word = rng.choice(kind[degree])
    draw = rng.random()
    if " " in word or draw < 0.45:
        return word
    if draw < 0.85:
        return f"{rng.choice(DEGREE[degree])} {word}"
    other = rng.choice(kind[degree])
    return word if other == word or " " in other else f"{word} and {other}"


def verdict(rng: random.Random, degree: int, noun: str) -> str:
    return expand(rng, rng.choice(VERDICT[degree]), {"noun": noun, "thing": THING[degree]})
