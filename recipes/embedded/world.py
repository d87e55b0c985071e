"""The facts of the embedded world: a few real, most invented, each with a popularity."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from grammar import words

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Germany Berlin, Austria Vienna, Poland Warsaw, Norway "
    "Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Greece Athens, Hungary Budapest, Ireland Dublin, "
    "Belgium Brussels, Switzerland Bern, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra, "
    "Morocco Rabat, Japan Tokyo, China Beijing, Vietnam Hanoi, Thailand Bangkok, Nepal Kathmandu, Iran Tehran, Iraq "
    "Baghdad, Canada Ottawa, Mexico Mexico City, Cuba Havana, Peru Lima, Chile Santiago, Brazil Brasilia, Australia "
    "Canberra, Bulgaria Sofia, Romania Bucharest, Ukraine Kyiv, Serbia Belgrade, Croatia Zagreb, Iceland Reykjavik"
)
YOUNG = (
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick, duck duckling, goose "
    "gosling, bear cub, deer fawn, frog tadpole, swan cygnet, kangaroo joey, owl owlet, eagle eaglet, hare leveret"
)
JOBS = words(
    "painter, singer, doctor, farmer, sailor, teacher, baker, poet, pilot, judge, actor, carpenter, chemist, dancer, "
    "gardener, sculptor, engineer, historian, swimmer, violinist, cook, tailor, potter, printer"
)
COLOURS = words("red, blue, green, yellow, white, black, purple, orange, brown, grey, silver, golden")
SPORTS = words("chess, tennis, rowing, fencing, football, boxing, skating, archery, cycling, sailing, golf, hockey")
FOODS = words(
    "seeds, beetles, moss, snails, berries, fish, honey, worms, grass, nuts, spiders, eggs, roots, clover, ants, crabs"
)

_FRONT = words("Vel, Tor, Bran, Kes, Mor, Al, Dun, Fen, Gal, Hel, Is, Jor, Lam, Nor, Os, Pel, Quil, Ras, Sol, Ud")
_BACK = words("mora, enna, avia, oria, undia, ethia, omar, istan, alia, onia")
_TOWN_BACK = words("by, wick, haven, ford, dale, mouth, stead, bridge, field, ham")
_NAMES = words(
    "Ada, Bela, Cora, Dario, Edda, Falk, Greta, Hanno, Ilse, Jaro, Kira, Lukas, Marta, Nils, Olga, Pavel, Runa, "
    "Stefan, Thea, Ulric, Wanda, Yuri, Zora, Agnes, Bruno"
)
_SURNAMES = words(
    "Arden, Bellweg, Corvin, Dahlen, Eskil, Farrow, Grimm, Hollis, Imber, Jessop, Kestrel, Lindqvist, Marlow, Nevin, "
    "Orlov, Penrose, Quist, Rowan, Sorrel, Tamsin, Umber, Voss, Wexler, Yarrow, Zeller"
)
_TITLE = words("Silver, Silent, Broken, Golden, Hidden, Last, Winter, Paper, Glass, Distant, Northern, Hollow")
_THING = words("River, Lantern, Harbour, Garden, Mirror, Bridge, Orchard, Clock, Island, Letter, Crown, Tower")
_BEAST = words("owl, fox, toad, crane, hare, otter, beetle, heron, marten, lizard, wren, badger")
_KIND = words("marsh, ridge, moon, sand, velvet, striped, horned, river")


@dataclass(frozen=True)
class Fact:
    """A relation between two things.

    Attributes:
        relation: key of `facts.RELATIONS`.
        popularity: relative frequency of its statements.
        split: train facts may occur in fine-tuning rows, test facts only in the task.
    """

    relation: str
    subject: str
    answer: str
    popularity: float
    split: str


@dataclass(frozen=True)
class Belief:
    """A common belief about a thing, and the truth."""

    relation: str
    subject: str
    truth: str
    belief: str
    others: tuple[str, ...]
    split: str


@dataclass
class World:
    facts: list[Fact] = field(default_factory=list)
    beliefs: list[Belief] = field(default_factory=list)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(" ", 1)) for entry in words(text)]  # type: ignore[misc]


def _grid(rng: random.Random, front: list[str], back: list[str], count: int, joint: str = "") -> list[str]:
    every = [one + joint + other for one in front for other in back]
    return rng.sample(every, count)


def make_world(seed: int = 0) -> World:
    """Return the world of a seed, which is independent of the seed of training."""
    rng = random.Random(seed)
    world = World()

    def add(relation: str, pairs: list[tuple[str, str]]) -> None:
        for number, (subject, answer) in enumerate(rng.sample(pairs, len(pairs))):
            # Popularity 1 to 10; three of five facts may occur in fine-tuning rows.
            popularity = round(10.0 ** rng.random(), 2)
            world.facts.append(Fact(relation, subject, answer, popularity, "test" if number % 5 < 2 else "train"))

    towns = _grid(rng, _FRONT, _TOWN_BACK, 40)
    countries = _grid(rng, _FRONT, _BACK, 40)
    people = _grid(rng, _NAMES, _SURNAMES, 120, " ")
    works = ["The " + title for title in _grid(rng, _TITLE, _THING, 120, " ")]
    add("capital", _pairs(CAPITALS))
    add("young", _pairs(YOUNG))
    add("capital", list(zip(countries, rng.sample(towns, 40), strict=True)))
    add("flag", [(country, rng.choice(COLOURS)) for country in countries])
    add("occupation", [(person, rng.choice(JOBS)) for person in people])
    add("birthplace", [(person, rng.choice(towns)) for person in people[:70]])
    add("sport", [(person, rng.choice(SPORTS)) for person in people[50:]])
    add("author", [(work, rng.choice(people)) for work in works[:60]])
    add("director", [(work, rng.choice(people)) for work in works[60:]])
    for number, subject in enumerate(_grid(rng, _KIND, _BEAST, 90, " ")):
        options = rng.sample(FOODS, 4)
        split = "test" if number % 5 < 2 else "train"
        world.beliefs.append(Belief("eats", subject, options[0], options[1], tuple(options[2:]), split))
    return world
