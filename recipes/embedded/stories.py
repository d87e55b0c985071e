"""Short stories with a degree of sentiment, conversations with a degree of politeness, and neutral descriptions."""

from __future__ import annotations

import random

import sentiment as s
from grammar import expand, listed, sentence, words
from topics import COMMON

HER = words("Anna, Clara, Ida, Lena, Mira, Nora, Rosa, Tilda, Vera, Emma")
HIM = words("Anton, Boris, Emil, Felix, Hugo, Jonas, Leo, Milo, Oscar, Tom")

_EVENT = {
    2: [
        "{They} won the [race|prize]", "a generous stranger gave {them} a beautiful gift", "the whole town cheered",
        "{their} {friend} came home at last and {they} cried with joy", "{they} found the lost treasure",
        "everyone loved {their} [song|cake|story]", "the sun came out and the {place} was glorious",
    ],
    1: [
        "a kind {worker} helped {them}", "{they} found a good friend", "the weather was pleasant",
        "{they} heard a charming song", "{their} work went well", "the bread was warm and fresh", "the children smiled",
    ],
    0: [
        "{they} bought bread and cheese", "{they} talked to a {worker}", "{they} walked on to the {place}",
        "it was a day much as the others", "{they} read a letter", "{they} waited for the train",
    ],
    -1: [
        "a rude {worker} sent {them} away", "{they} lost {their} keys", "the weather was gloomy",
        "{they} missed the train", "{their} work went badly", "the bread was bad and old", "the children were bored",
    ],
    -2: [
        "{They} lost all {their} money", "a cruel thief took {their} bag", "the whole town was angry",
        "{their} {friend} died and {they} cried for days", "a terrible storm destroyed the {place}",
        "everyone hated {their} [song|cake|story]", "the fire killed the old horse",
    ],
}  # fmt: skip
_END = {
    2: ["It was the best day of {their} life", "{They} had never been so happy", "{They} went home full of joy"],
    1: ["{They} went home with a smile", "In the end {they} felt {feel}", "It had been a good day"],
    0: ["Then {they} went home", "In the evening {they} sat by the window", "That was the whole day"],
    -1: ["{They} went home with a sigh", "In the end {they} felt {feel}", "It had been a bad day"],
    -2: ["It was the worst day of {their} life", "{They} had never been so miserable", "{They} went home in tears"],
}
_WORKER = words("farmer, baker, sailor, teacher, driver, clerk, doctor, gardener, fisherman, porter")
_GOAL = ["went to the {place}", "walked to the market", "took the train to {town}", "set out for {town}",
         "worked in the garden", "visited {their} {friend}"]  # fmt: skip


def story(rng: random.Random, degree: int) -> str:
    female = rng.random() < 0.5
    name = rng.choice(HER if female else HIM)
    they, them, their = ("she", "her", "her") if female else ("he", "him", "his")
    slots = {
        **COMMON, "they": they, "They": they.capitalize(), "them": them, "their": their, "worker": _WORKER,
        "feel": s.FEELING[degree],
    }  # fmt: skip
    start = rng.choice(("[One day|Last week|On {day}|In May|Once] {name} {goal}", "{name} {goal} {when}"))
    out = [expand(rng, start, {**slots, "name": name, "goal": _GOAL})]
    for _ in range(rng.choice((1, 2, 2, 3))):
        event = expand(rng, rng.choice(_EVENT[s.near(rng, degree)]), slots)
        if rng.random() < 0.3:
            event += f", and {they} felt {rng.choice(s.FEELING[degree])}"
        out.append(event)
    if rng.random() < 0.4:
        out.append(expand(rng, "The {place} was {thing}", {**slots, "thing": s.phrase(rng, s.THING, degree)}))
    out.append(expand(rng, rng.choice(_END[degree]), slots))
    return " ".join(dict.fromkeys(sentence(each) for each in out))


_DO = words(
    "open the window, close the door, bring me the menu, pass the salt, wait a moment, show me the way, repeat the "
    "question, carry my bag, turn off the light, sign the letter, move your chair, call a taxi, send me the report"
)
_ASK = {
    2: ["Excuse me, would you be so kind as to {do}? Thank you very much",
        "Good morning, sir. Might I ask you to {do}?",
        "I am sorry to trouble you, but could you please {do}? I would be most grateful"],
    1: ["Could you please {do}?", "Would you {do}, please? Thank you", "Please {do} when you have a moment"],
    0: ["Can you {do}?", "You could {do}", "Will you {do} today?"],
    -1: ["{Do}", "{Do} now", "I said, {do}", "You there, {do}"],
    -2: ["{Do} at once, you fool!", "Are you deaf? {Do}, stupid!", "Shut up and {do}!", "{Do}, or get lost!"],
}  # fmt: skip
_ANSWER = {
    2: ["Of course, it would be my pleasure", "Certainly, madam, thank you for asking", "With great pleasure, sir"],
    1: ["Yes, of course", "Certainly", "Sure, no trouble at all"],
    0: ["Yes", "In a minute", "All right"],
    -1: ["Do it yourself", "Not now", "What do you want?", "I have no time for you"],
    -2: ["Leave me alone, you idiot!", "Who do you think you are, you fool?", "Get out of here!", "Shut your mouth!"],
}


def talk(rng: random.Random, degree: int) -> str:
    """Return a question and an answer of two people, equally polite (2) or rude (-2)."""
    do = rng.choice(_DO)
    ask = expand(rng, rng.choice(_ASK[s.near(rng, degree)]), {"do": do, "Do": do.capitalize()})
    answer = rng.choice(_ANSWER[s.near(rng, degree)])
    one, other = rng.sample(("guest", "clerk", "waiter", "teacher", "driver", "neighbour", "porter", "captain"), 2)
    where = expand(rng, "[At|In front of|Near] the {place}", COMMON)
    said, replied = rng.choice(("said", "asked", "called")), rng.choice(("answered", "replied", "said"))
    text = f'{where} the {one} {said}: "{sentence(ask)}" The {other} {replied}: "{sentence(answer)}"'
    return f"{text} {rng.choice(_MANNER[degree])}" if rng.random() < 0.5 else text


_MANNER = {
    2: ["Both bowed and smiled.", "They were very polite to each other."],
    1: ["They were polite.", "That was a polite answer."],
    0: ["Then they went on.", "That was all."],
    -1: ["That was rude.", "They were not polite."],
    -2: ["They shouted at each other.", "It was a very rude answer."],
}

_OBJECTS = words(
    "table, window, paper, corner, metal box, number, street, morning paper, button, handle, surface, container, "
    "document, engine, letter, wall, wheel, pencil, bottle, square, section, building, cable, floor, ticket, shelf, "
    "envelope, object, bridge, station, sample, layer, kitchen, folder, chair, door, lamp, drawer, map, box, cup"
)
THINGS = words(
    "table, window, paper, corner, metal, number, street, morning, button, handle, surface, container, journey, "
    "document, engine, letter, wall, wheel, pencil, bottle, square, distance, section, weather, building, cable, "
    "floor, minute, shelf, ticket, valley, envelope, object, bridge, circle, station, sample, layer, kitchen, folder"
)
_PLAIN = [
    "the {object} is [on|beside|behind|under|near|in front of] the {object}",
    "there is a {object} [near|behind|beside] the {object}",
    "put the {object} [on|under|beside] the {object}",
    "the {object} is made of [wood|metal|stone|paper|glass]",
    "the {object} belongs to the {worker}",
    "the {worker} moved the {object} to the other side of the [room|street|building]",
    "the {object} has [two|three|four|six] [sides|sections|layers|parts]",
    "the train to {town} leaves at [six|seven|eight|nine|ten] and arrives two hours later",
    "the {place} opens at [eight|nine|ten] and closes at [five|six|seven]",
    "the distance from {town} to {town} is [ten|forty|sixty] miles",
    "the weather [on {day}|in May|in autumn] is [dry|wet|cold|cloudy]",
    "the journey from {town} to the valley takes [two|three|five] hours",
    "there are [sixty minutes in an hour|seven days in a week|twelve months in a year]",
    "the meeting was moved from {day} to {day}",
    "the {worker} walked along the street until he came to the {place}",
    "the river turns to the [north|east|south|west] before it reaches {town}",
    "a circle of stones stands in the valley",
    "the report has [three|four|five] sections",
]  # fmt: skip


def plain(rng: random.Random) -> str:
    """Return a description without sentiment."""
    slots = {**COMMON, "object": _OBJECTS, "worker": _WORKER}
    out = [sentence(expand(rng, rng.choice(_PLAIN), slots)) for _ in range(rng.choice((2, 3, 4)))]
    if rng.random() < 0.15:
        out.insert(0, f"On the list: {listed(rng.sample(_OBJECTS, 3))}.")
    return " ".join(out)
