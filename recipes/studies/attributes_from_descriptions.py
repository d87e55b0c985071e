"""Six attributes from descriptions: their effect on texts at equal perplexity, against three baselines.

Run     python recipes/studies/attributes_from_descriptions.py --model M --prompts neutral.jsonl --out runs.jsonl \\
            --seeds 0,1,2 --plot effects.png
        --openings in the place of --prompts for a model of children's stories
Needs   a causal LM
Shows   one JSON line per attribute, method, seed and side in --out, continued by a second call; the effects, and a
        picture of them

The effect is the share of texts that have the attribute on its positive side minus the share on its negative side, each
the largest at which the perplexity of the texts under the unsteered base is at most RATIO times that of unsteered
texts: at the measured strengths, and where the line between two of them crosses RATIO. Rules that do not depend on
descriptions, stems and templates decide which text has the attribute (RULES).

Methods, all in the same layers and with the same share of the residual stream per unit of s:

    description   `braces attr-build --describe ... --against ...`
    mean          the same pairs, difference of means at the FFN inputs
    difference    the same pairs, difference of means at the outputs of the layers
    pca           the same pairs and places, first principal component of the differences, as repeng's `pca_center`
    words         difference of two word lists, as `braces attr-build --words` with `--reduction mean`
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runs import Runs

from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.attributes.build import attribute_from_descriptions, build_attribute, description_pairs
from braces_cli.core.attributes.directions import pair_states, reduce_pairs
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.vector import Attribute, opposite
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.core.render import figure, save_figure
from braces_cli.scoring.likelihood import Likelihood, continuation_likelihoods
from braces_cli.scoring.scorers import scorer
from braces_cli.steering.prompts import read_prompts
from braces_cli.steering.texts import generate_texts, text_requests

RATIO = 1.5
# First strength of each side; the second strength depends on the perplexity at the first.
FIRST_STRENGTH = 3.0
LARGEST_STRENGTH = 9.6


@dataclass(frozen=True)
class Studied:
    """An attribute: descriptions of its two sides, and words of both sides."""

    describe: str
    against: str
    words: str
    words_against: str


ATTRIBUTES = {
    "mood": Studied(
        "a cheerful person", "a gloomy person",
        "happy glad cheerful merry smiling joyful delighted", "sad gloomy miserable crying unhappy lonely sorry",
    ),
    "tense": Studied(
        "what happened a long time ago", "what will happen tomorrow",
        "was were had did went said came saw", "will shall can may is are has does",
    ),
    "person": Studied(
        "me and what I did myself", "him and what he did himself",
        "I me my mine myself", "he him his himself she",
    ),
    "formality": Studied(
        "an official report of a commission", "a chat with a good friend",
        "regarding consequently furthermore procedure institution committee", "yeah okay stuff guy cool gonna",
    ),
    "food": Studied(
        "a big dinner with a lot of food", "a long walk in the mountains",
        "food dinner eat cook bread soup cake meal", "walk mountain road forest river hill path tree",
    ),
    "question": Studied(
        "a question that a person asks", "an answer that a person gives",
        "what why how who where when which", "because yes no so thus therefore",
    ),
}  # fmt: skip

_PAST = re.compile(r"\b(?:was|were|had|did|went|said|came|saw|got|took|made|gave|told|found|\w{2,}ed)\b", re.I)
_OTHER_TENSE = re.compile(r"\b(?:is|are|am|has|have|do|does|will|shall|can|may|must|\w+'(?:s|re|ll|ve))\b", re.I)
_FIRST = re.compile(r"\b(?:I|me|my|mine|myself)\b")
_THIRD = re.compile(r"\b(?:he|him|his|himself|she|her|hers|herself)\b", re.I)
_FOOD = re.compile(
    r"\b(?:food|eat|eats|eating|ate|dinner|lunch|breakfast|meal|cook|cooked|cooking|kitchen|bread|soup|cake|cakes|cookie|"
    r"cookies|pie|fruit|apple|apples|meat|fish|rice|egg|eggs|milk|sugar|salad|cheese|chicken|restaurant|delicious|tasty|"
    r"hungry|sandwich|pizza|chocolate|recipe|sauce|butter|candy|ice cream)\b",
    re.I,
)
# Letters per word: about 4.2 in English prose, fewer in speech.
_FORMAL_LETTERS = 4.2


def _vader() -> Callable[[str], bool]:
    vader = scorer("vader")
    return lambda text: bool(vader.score([text], "positive")[0].has)


def _formal(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return bool(words) and sum(map(len, words)) / len(words) >= _FORMAL_LETTERS


# Return True for a text with the attribute.
RULES: dict[str, Callable[[str], bool]] = {
    "mood": _vader(),
    "tense": lambda text: len(_PAST.findall(text)) > len(_OTHER_TENSE.findall(text)),
    "person": lambda text: len(_FIRST.findall(text)) > len(_THIRD.findall(text)),
    "formality": _formal,
    "food": lambda text: bool(_FOOD.search(text)),
    "question": lambda text: "?" in text,
}

_NAMES = ("Lily", "Tom", "Ben", "Sara", "Max", "Anna", "Tim", "Mia", "Sam", "Lucy")
_OPENINGS = (
    "Once upon a time, there was a child named {}.", "One day, {} went to the park.", "{} had a big box.",
    "{} and a friend were in the garden.", "In the morning, {} saw a", "{} lived in a small house.",
    "{} looked at the", "When {} came home,", "{} wanted to play with the", "The dog ran to {} and",
)  # fmt: skip


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    runs = Runs(args.out)
    if args.openings:
        prompts = [opening.format(name) for name in _NAMES for opening in _OPENINGS]
    else:
        prompts = list(read_prompts((), args.prompts, sys.stdin))
    study = Study(args.model, prompts[args.skip : args.skip + args.count], args)
    common = {"model": Path(args.model).name, "skip": args.skip, "count": len(study.prompts), "tokens": args.tokens}
    for seed in map(int, args.seeds.split(",")):
        base = runs.get({**common, "seed": seed, "method": "unsteered"}, partial(study.unsteered, seed))
        for name in args.attributes.split(","):
            for method in args.methods.split(","):
                for sign in (1, -1):
                    which = {"seed": seed, "attribute": name, "method": method, "side": sign}
                    runs.get({**common, **which}, partial(study.side, name, method, seed, sign, base))
    mine = [run for run in runs.done if all(run[key] == value for key, value in common.items())]
    show(mine)
    if args.plot is not None:
        draw(runs.done, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--openings", action="store_true", help="use beginnings of children's stories as prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attributes", default=",".join(ATTRIBUTES))
    parser.add_argument("--methods", default="description,difference,pca,words")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--skip", type=int, default=0, help="number of prompts to skip")
    parser.add_argument("--count", type=int, default=100, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.prompts is None and not args.openings:
        parser.error("give --prompts FILE or --openings")
    return args


class Study:
    """An open base, and the attributes built on it."""

    def __init__(self, model: str, prompts: Sequence[str], args: argparse.Namespace) -> None:
        self._model = model
        self._args = args
        self._session: Session | None = None
        self._built: dict[tuple[str, str], Attribute] = {}
        self.prompts = prompts

    @property
    def session(self) -> Session:
        """The session, opened when the first run is measured."""
        self._session = self._session or open_session(self._model, None, LoadOptions())
        return self._session

    def unsteered(self, seed: int) -> dict[str, Any]:
        texts, perplexity = self._texts(seed)
        return {"perplexity": perplexity, "shares": {name: share(name, texts) for name in ATTRIBUTES}}

    def side(self, name: str, method: str, seed: int, sign: int, base: dict[str, Any]) -> dict[str, Any]:
        """Return (s, perplexity ratio, share) of no steering and of two strengths of one sign."""
        attribute = self._attribute(name, method)
        points = [(0.0, 1.0, base["shares"][name])]
        s = FIRST_STRENGTH
        for _ in range(2):
            texts, perplexity = self._texts(seed, [(attribute, sign * s)])
            ratio = perplexity / base["perplexity"]
            points.append((s, ratio, share(name, texts)))
            # The log of the ratio grows about as the square of the strength.
            s = min(LARGEST_STRENGTH, s * math.sqrt(min(max(math.log(RATIO) / max(math.log(ratio), 0.02), 0.1), 9.0)))
        return {"points": points, "example": texts[0]}

    def _texts(self, seed: int, terms: Sequence[tuple[Attribute, float]] = ()) -> tuple[list[str], float]:
        """Return continuations of the steered base, and their perplexity under the base without steering."""
        sampling = Sampling(self._args.tokens, temperature=1.0, top_p=0.9, seed=seed)
        requests, size = text_requests(self.prompts), self._args.batch_size
        with steered(self.session, terms):
            texts = list(generate_texts(self.session, requests, sampling, batch_size=size))
        pairs = list(zip(self.prompts, texts, strict=True))
        return texts, sum(continuation_likelihoods(self.session.base, pairs, size), Likelihood()).perplexity

    def _attribute(self, name: str, method: str) -> Attribute:
        if (name, method) not in self._built:
            self._built[name, method] = build(self.session, ATTRIBUTES[name], method)
        return self._built[name, method]


def build(session: Session, studied: Studied, method: str) -> Attribute:
    """Build the attribute by one of the methods."""
    sides = [studied.describe], [studied.against]
    if method == "words":
        ends = [build_attribute(session, "x", words.split()) for words in (studied.words, studied.words_against)]
        return opposite(*ends)[0]
    reduction = None if method == "description" else "mean"
    attribute = attribute_from_descriptions(session, "x", *sides, reduction=reduction)
    if method in ("description", "mean"):
        return attribute
    states = pair_states(session, description_pairs(*sides), captured="output")
    direction = reduce_pairs(states, "pca" if method == "pca" else "mean")
    return replace(attribute, direction=direction)


def share(name: str, texts: Sequence[str]) -> float:
    return sum(map(RULES[name], texts)) / len(texts)


def within_ratio(points: Sequence[tuple[float, float, float]], sign: int) -> float:
    """Return the most extreme share at a perplexity ratio of at most RATIO, from (s, ratio, share) with s = 0."""
    ordered = sorted(points)
    shares = [share for _, ratio, share in ordered if ratio <= RATIO]
    for (_, low, before), (_, high, after) in itertools.pairwise(ordered):
        if low <= RATIO < high:
            part = (math.log(RATIO) - math.log(low)) / (math.log(high) - math.log(low))
            shares.append(before + part * (after - before))
    return max(shares, key=lambda share: sign * share)


def effects(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """Return the effects of all seeds with both sides, by (model, attribute, method)."""
    shares: dict[tuple[str, str, str, int], dict[int, float]] = {}
    for run in runs:
        if "side" in run:
            key = (run["model"], run["attribute"], run["method"], run["seed"])
            shares.setdefault(key, {})[run["side"]] = within_ratio(run["points"], run["side"])
    found: dict[tuple[str, str, str], list[float]] = {}
    for (model, attribute, method, _), sides in shares.items():
        if len(sides) == 2:
            found.setdefault((model, attribute, method), []).append(sides[1] - sides[-1])
    return found


def show(runs: Sequence[dict[str, Any]]) -> None:
    """Print the effects in points: mean and range over seeds."""
    for (model, attribute, method), values in effects(runs).items():
        low, high, mean = (100 * value for value in (min(values), max(values), statistics.fmean(values)))
        print(f"{model} {attribute} {method}: {mean:+.1f} [{low:+.1f}, {high:+.1f}] ({len(values)} seeds)")


NAMES = {
    "description": "description (gradient of the odds)",
    "mean": "description, difference of means at FFN inputs",
    "difference": "description, difference of means at layer outputs",
    "pca": "description, PCA at layer outputs",
    "words": "word lists, difference of means",
}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot effects by attribute, one colour per method, one panel per model; lines show the range over seeds."""
    found = effects(runs)
    models = list(dict.fromkeys(model for model, _, _ in found))
    methods = [method for method in NAMES if any(each == method for _, _, each in found)]
    drawn = figure(11, 4.2 * len(models))
    drawn.suptitle(
        f"Share of texts with the attribute, positive minus negative side, at up to {RATIO} times the perplexity"
    )
    for axes, model in zip(drawn.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
        for place, method in enumerate(methods):
            rows = [found.get((model, attribute, method), []) for attribute in ATTRIBUTES]
            at = [index + (place - (len(methods) - 1) / 2) * 0.8 / len(methods) for index in range(len(rows))]
            heights = [100 * statistics.fmean(row) if row else 0.0 for row in rows]
            axes.bar(at, heights, width=0.8 / len(methods), label=NAMES[method])
            for x, row in zip(at, rows, strict=True):
                if len(row) > 1:
                    axes.plot([x, x], [100 * min(row), 100 * max(row)], color="black", linewidth=1)
        axes.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("points")
        axes.set_title(model, fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
    handles = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    save_figure(drawn, path)


if __name__ == "__main__":
    main()
