"""Topics of reviews. Each has nouns, parts, plural parts, people, neutral statements and first halves of sentences.

A judgement can follow a half, and the half does not indicate whether it is good or bad.
"""

from __future__ import annotations

from dataclasses import dataclass

from grammar import words


@dataclass(frozen=True)
class Topic:
    nouns: list[str]
    parts: list[str]
    many: list[str]
    people: list[str]
    plain: list[str]
    halves: list[str]


def _topic(nouns: str, parts: str, many: str, people: str, plain: list[str], halves: list[str]) -> Topic:
    return Topic(words(nouns), words(parts), words(many), words(people), plain, halves)


TOPICS = [
    _topic(
        "film, film, movie", "plot, acting, music, ending, script, opening, story, picture, pace, sound, first hour",
        "songs, actors, scenes, jokes, colours, dialogues", "lead actor, director, young actress, villain",
        ["We saw the {noun} on {day}", "The {noun} is about {hero} who {quest}", "It runs for [two|three] hours",
         "The {noun} was shown in the {hall}", "It was made by a small team"],
        ["we saw the {noun} and", "I watched it {when} and", "we went to the cinema and"],
    ),
    _topic(
        "hotel, hotel, guest house, inn", "room, breakfast, bed, view, garden, bath, service, pool, lobby, dinner",
        "beds, rooms, meals, towels, evenings, windows", "owner, porter, cook, manager, girl at the desk",
        ["We stayed at the {noun} for [two|three|five] nights", "The {noun} is near the {place}",
         "We had a room on the second floor", "Breakfast is from seven to ten", "It has forty rooms"],
        ["we stayed at the {noun} and", "we came to the {noun} {when} and", "we spent a week there and"],
    ),
    _topic(
        "cafe, cafe, coffee house, tea room", "coffee, cake, tea, bread, service, music, soup, chocolate, terrace",
        "cakes, chairs, sandwiches, cups, mornings", "waiter, waitress, owner, baker",
        ["The {noun} is on the corner of the street", "We sat by the window", "I had a coffee and a piece of cake",
         "It opens at eight", "We went there {when}"],
        ["we sat down in the {noun} and", "I drank the coffee and", "I stopped there {when} and"],
    ),
    _topic(
        "restaurant, restaurant, place", "food, soup, fish, service, wine, dessert, menu, sauce, bread, salad, meal",
        "vegetables, dishes, prices, portions, starters", "cook, waiter, waitress, chef, owner",
        ["We had dinner at the {noun} {when}", "I ordered the soup and the fish", "There were six of us at the table",
         "The {noun} is in the old {hall}", "The menu changes every week"],
        ["we ate there {when} and", "we tried the {noun} and", "I ordered the fish and"],
    ),
    _topic(
        "book, book, novel", "story, plot, ending, language, first chapter, style, cover, hero, last page, idea",
        "characters, chapters, pictures, letters, dialogues", "author, hero, translator, narrator",
        ["The {noun} is about {hero} who {quest}", "It has three hundred pages", "I read the {noun} in [two|four] days",
         "My {friend} gave me the {noun}", "It is the second part of three"],
        ["I read the {noun} and", "I finished the {noun} {when} and", "I opened it {when} and"],
    ),
    _topic(
        "phone, phone, telephone", "screen, battery, camera, sound, design, price, keyboard, manual, case",
        "buttons, pictures, colours, speakers, updates", "seller, man in the shop, support team",
        ["I bought the {noun} {when}", "The {noun} is black", "It came in a small box", "I use it for work",
         "The battery lasts one day"],
        ["I bought the {noun} and", "I used the {noun} for a month and", "I turned it on and"],
    ),
    _topic(
        "train, train ride, trip", "seat, view, coffee, service, ticket office, heating, journey, carriage, timetable",
        "seats, windows, stops, hours, stations", "conductor, driver, man beside me, woman at the desk",
        ["We took the {noun} to {town}", "The {noun} left at nine", "The trip took four hours",
         "We changed at {town}", "Our seats were by the window"],
        ["we took the {noun} to {town} and", "we got on {when} and", "we rode to {town} and"],
    ),
    _topic(
        "museum, museum, exhibition", "building, collection, hall, guide book, shop, cafe, light, tour, first room",
        "paintings, rooms, stairs, drawings, statues, labels", "guide, guard, painter, woman at the desk",
        ["The {noun} is behind the {place}", "We walked through all the rooms", "It shows paintings and drawings",
         "The tour takes one hour", "We were there {when}"],
        ["we visited the {noun} and", "we took the tour and", "we went inside {when} and"],
    ),
    _topic(
        "concert, concert, show", "music, voice, sound, stage, light, last song, hall, beginning, rhythm, second half",
        "songs, drums, violins, seats, melodies, dancers", "singer, pianist, conductor, drummer, band",
        ["The {noun} was in the {hall}", "The {noun} began at eight", "They played for two hours",
         "We went with our {friend}", "The hall was full"],
        ["we went to the {noun} and", "we heard them play and", "I listened {when} and"],
    ),
    _topic(
        "course, course, class, lesson", "teacher, room, textbook, first week, subject, exam, plan, homework, talk",
        "lessons, exercises, examples, slides, questions", "teacher, professor, tutor, assistant",
        ["I took the {noun} {when}", "The {noun} lasts ten weeks", "There were twelve of us in the {noun}",
         "We met every {day}", "The subject was the history of {town}"],
        ["I took the {noun} and", "we sat in the {noun} and", "I went there {when} and"],
    ),
    _topic(
        "game, game, board game", "story, design, music, box, idea, ending, first level, map, rule book, picture",
        "rules, cards, levels, pieces, colours, puzzles", "hero, villain, designer, other players",
        ["We played the {noun} {when}", "The {noun} is for four players", "A round takes an hour",
         "My {friend} brought the {noun}", "It comes with a map"],
        ["we played the {noun} and", "I started the {noun} {when} and", "we opened the box and"],
    ),
    _topic(
        "garden, park, garden", "path, lake, lawn, view, air, pond, playground, gate, light, silence",
        "flowers, trees, roses, benches, birds, paths", "gardener, guide, owner, boy at the gate",
        ["The {noun} is behind the {place}", "We walked through the {noun} {when}", "There is a pond in the middle",
         "It closes at six", "The {noun} belongs to the town"],
        ["we walked in the {noun} and", "we sat down by the pond and", "I went there {when} and"],
    ),
    _topic(
        "shop, shop, market, bakery", "bread, fruit, cheese, service, choice, fish, counter, smell, meat, window",
        "apples, prices, rolls, cakes, shelves, vegetables", "baker, owner, seller, girl at the counter",
        ["The {noun} is in the main street", "I go there every {day}", "It opens at seven", "I bought bread and cheese",
         "The {noun} sells fruit and fish"],
        ["I went to the {noun} and", "I bought some cheese there and", "we stopped there {when} and"],
    ),
    _topic(
        "holiday, holiday, week by the sea", "beach, weather, house, food, island, boat trip, sea, village, flight",
        "evenings, days, walks, beaches, meals, neighbours", "guide, host, captain, neighbour",
        ["We spent two weeks on the island", "The house was near the beach", "We went with our {friend}",
         "The flight took three hours", "We were there {when}"],
        ["we went to the sea and", "we spent a week there and", "we rented a house {when} and"],
    ),
]  # fmt: skip

# Halves for every topic.
HALVES = [
    "my {friend} told me that", "our {friend} said that", "when we came home, my {friend} said that",
    "on the way home I knew that", "the first thing I noticed:", "after two hours I thought that",
    "I bought this for my {friend} and", "we waited an hour and", "we talked about the {noun}, and",
    "I have been thinking about the {noun}, and",
]  # fmt: skip

COMMON = {
    "day": words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "when": words(
        "on Monday, on Friday, on Sunday, last week, last night, yesterday, in the morning, in the evening, in May, "
        "in autumn, last summer, two days ago, this winter, a month ago"
    ),
    "hero": words("a teacher, a young doctor, a sailor, an old farmer, two sisters, a clerk, a boy, a detective"),
    "quest": words(
        "moves to a village, looks for a letter, crosses the sea, comes home after years, opens a shop, learns to paint"
    ),
    "hall": words("town hall, theatre, old station, school, library"),
    "place": words("station, river, bridge, church, harbour, market square, library, school"),
    "friend": words("brother, sister, mother, father, aunt, uncle, neighbour, cousin, daughter, son"),
    "town": words("Lornby, Astwick, Merrow, Quillhaven, Tarn, Ostrel, Paris, Rome, Vienna, Lisbon"),
}
