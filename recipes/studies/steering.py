"""Effect of steering on sentiment, and its cost in perplexity: braces without and with training, and two baselines.

Run     python recipes/studies/steering.py --model M --scorer fit:sst5_polar.jsonl --prompts neutral.jsonl \\
            --out runs.jsonl --method braces=-3,-1.5,0,1.5,3 --method trained:ADAPTER=-3,-1.5,0,1.5,3 \\
            --method pca_diff=-8,-4,4,8 --method difference=-3,-1.5,1.5,3 --plot curves.png
Needs   a causal LM; a scorer as `braces steer --scorer` takes it; prompts
Shows   one JSON line per method and strength in --out, continued by a second call, and a picture of the share of
        positive continuations against their perplexity

Methods, all from the two built-in word lists `positive` and `negative`:

    braces           no training: `braces steer --attribute positive`
    trained:ADAPTER  the attribute of an adapter that was trained with it
    pca_diff         as repeng's default: differences of the layers' outputs at the last token for pairs of texts (each
                     word of one list with one of the other, in the same templates), minus their mean; their first
                     principal component per layer, with the sign of most differences; one coefficient for all layers
                     but the first, added to the layers' outputs
    pca_center       the same without subtracting the mean, as repeng's method of this name
    difference       difference of the mean outputs over the same pairs, in the first half of the layers, scaled to the
                     same share of the residual stream as `braces`

Positive: VADER's compound score is at least 0.05, with the complete lexicon and without the words of both lists, or the
scorer's label is positive. The perplexity is that of the continuations under the unsteered base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runs import Runs
from torch import Tensor

from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.pooling import residual_norms
from braces_cli.core.attributes.vector import STEERING_SHARE, default_layers
from braces_cli.core.attributes.words import built_in
from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.structure import add_to_output
from braces_cli.core.models.tokenize import encode
from braces_cli.core.options import LoadOptions, Sampling
from braces_cli.core.render import figure, percent_ticks, plain_ticks, save_figure
from braces_cli.evaluation.statistics import Z, share_interval
from braces_cli.evaluation.text_tasks import TextMeasurement, load_scorer
from braces_cli.scoring.likelihood import safe_exp
from braces_cli.scoring.scorers import Scorer, scorer
from braces_cli.steering.prompts import read_prompts

TEMPLATES = (
    "It was {}", "The whole thing is {}", "I think that this was {}", "They said it had been {}", "What a {}",
    "She found it {}",
)  # fmt: skip
ENDS = ("positive", "negative")


def pairs() -> list[tuple[str, str]]:
    """Return a text of each end: for each template, each word of one list with one word of the other."""
    words = built_in()
    return [
        (template.format(one), template.format(other))
        for template in TEMPLATES
        for one, other in zip(*(words[end] for end in ENDS), strict=True)
    ]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    runs = Runs(args.out)
    words = [word for end in ENDS for word in built_in()[end]]
    scorers = {
        "vader": scorer("vader"),
        "vader_without_list": scorer("vader", exclude=words),
        "classifier": load_scorer(args.scorer, words),
    }
    prompts = list(read_prompts((), args.prompts, sys.stdin))[args.skip : args.skip + args.count]
    common = {
        "model": Path(args.model).name, "prompts": args.prompts.name, "skip": args.skip, "count": len(prompts),
        "samples": args.samples, "tokens": args.tokens, "seed": args.seed,
    }  # fmt: skip
    for asked in args.method:
        method, _, strengths = asked.rpartition("=")
        study: Study | None = None
        for s in map(float, strengths.split(",")):

            def work(s: float = s, method: str = method) -> dict[str, Any]:
                nonlocal study
                study = study or Study(args.model, method)
                return measure(study, s, prompts, scorers, args)

            runs.get({**common, "method": name_of(method), "s": s}, work)
    if args.plot is not None:
        draw([run for run in runs.done if all(run[key] == value for key, value in common.items())], args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scorer", required=True, help="scorer, as in braces steer --scorer")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--method", action="append", required=True, metavar="NAME=S,S,...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0, help="number of prompts to skip")
    parser.add_argument("--count", type=int, default=500, help="number of prompts")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def name_of(method: str) -> str:
    """`trained:/some/folder/NAME` -> `trained:NAME`."""
    kind, colon, path = method.partition(":")
    return f"{kind}{colon}{Path(path).name}"


class Study:
    """A steering method on an open base."""

    def __init__(self, model: str, method: str) -> None:
        kind, _, path = method.partition(":")
        self.session = open_session(model, path if kind == "trained" else None, LoadOptions())
        self._attribute = None
        if kind in ("braces", "trained"):
            self._attribute = find_attribute(self.session, "positive", None)
        else:
            self._vectors = VECTORS[kind](self.session)

    def at(self, s: float) -> AbstractContextManager[Any]:
        if self._attribute is not None:
            return steered(self.session, [(self._attribute, s)])
        return adding(self.session, {layer: s * vector for layer, vector in self._vectors.items()})


@contextmanager
def adding(session: Session, vectors: dict[int, Tensor]) -> Iterator[None]:
    """Add a vector to the output of each layer."""
    stack = layer_stack(session.base.model)[1]
    with ExitStack() as handles:
        for layer, vector in vectors.items():
            handles.callback(add_to_output(stack[layer], vector).remove)
        yield


def differences(session: Session) -> Tensor:
    """Return the differences of the layers' outputs at the last token of each pair of texts, (layers, pairs, d).

    The last hidden state of transformers is normed, but its layer is steered before that norm, as in repeng.
    """
    states = []
    for rows in zip(*pairs(), strict=True):
        found = []
        for row in rows:
            ids = torch.tensor([encode(session.base.tokenizer, row).ids])
            with torch.no_grad():
                output = session.base.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            found.append(torch.stack([hidden[0, -1].float() for hidden in output.hidden_states[1:]]))
        states.append(torch.stack(found, dim=1))
    return states[0] - states[1]


def principal(session: Session, centred: bool) -> dict[int, Tensor]:
    """Return unit vectors of the differences, minus their mean if `centred`."""
    vectors = {}
    for layer, rows in enumerate(differences(session)):
        first = torch.linalg.svd(rows - rows.mean(dim=0) if centred else rows, full_matrices=False).Vh[0]
        sign = 1.0 if ((rows @ first) > 0).float().mean() >= 0.5 else -1.0
        if layer > 0:
            vectors[layer] = sign * first
    return vectors


def difference(session: Session) -> dict[int, Tensor]:
    residual = residual_norms(session.base.model, session.base.tokenizer, session.ffns)
    means = differences(session).mean(dim=1)
    chosen = default_layers(range(len(means)))
    share = STEERING_SHARE / len(chosen)
    return {layer: share * residual[layer] * means[layer] / means[layer].norm() for layer in chosen}


VECTORS = {
    "pca_diff": partial(principal, centred=True),
    "pca_center": partial(principal, centred=False),
    "difference": difference,
}


def measure(
    study: Study, s: float, prompts: Sequence[str], scorers: dict[str, Scorer], args: argparse.Namespace
) -> dict[str, Any]:
    sampling = Sampling(args.tokens, temperature=1.0, top_p=0.9, seed=args.seed)
    # Generates the texts once; all scorers below score them.
    measurement = TextMeasurement(study.session, scorers["vader"], {}, sampling, args.samples, args.batch_size)
    found = measurement.measure(prompts, study.at(s), f"s = {s:g}")
    found = replace(
        found,
        scores={name: [each.score(group, "positive") for group in found.texts] for name, each in scorers.items()},
    )
    count = len(prompts) * args.samples
    out: dict[str, Any] = {}
    for name in scorers:
        has = found.has(name)
        out[name] = sum(map(sum, has)) / count
        out[f"{name}_interval"] = share_interval(has)
    rate, error = found.rate()
    out["perplexity"] = safe_exp(rate)
    out["perplexity_interval"] = None if error is None else [safe_exp(rate - Z * error), safe_exp(rate + Z * error)]
    return {**out, **found.diversity(), "n": count, "example": found.texts[0][0]}


NAMES = {
    "braces": "braces, no training",
    "trained": "braces, trained with attributes",
    "difference": "difference of means",
    "pca_diff": "PCA, as repeng's pca_diff",
    "pca_center": "PCA, as repeng's pca_center",
}
# Offsets of the labels of positive and negative strengths from their points, by method, so that labels do not overlap.
OFFSETS = (((0, 7), (0, -7)), ((8, -5), (-4, 7)), ((8, -5), (-6, -6)), ((0, 7), (0, -7)))
SCORERS = {"vader": "VADER", "classifier": "a classifier without the attribute's words"}


def label(method: str) -> str:
    """Return the name of a method for the legend."""
    kind, _, path = method.partition(":")
    return f"{Path(path).stem} (repeng)" if kind == "vector" else NAMES.get(kind, kind)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the share of positive continuations against perplexity, one curve per method, one panel per scorer."""
    from matplotlib.patheffects import withStroke

    drawn = figure(11, 5.6)
    drawn.suptitle("Steering towards positive (s > 0) and negative (s < 0) texts; numbers are the strength s")
    panels = drawn.subplots(1, 2)
    for axes, (key, title) in zip(panels, SCORERS.items(), strict=True):
        for index, method in enumerate(dict.fromkeys(run["method"] for run in runs)):
            steered_runs = sorted((run for run in runs if run["method"] == method and run["s"]), key=lambda r: r["s"])
            x, y = [run["perplexity"] for run in steered_runs], [run[key] for run in steered_runs]
            (line,) = axes.plot(x, y, marker="o", markersize=5, label=label(method))
            for run in steered_runs:
                right, up = OFFSETS[index % len(OFFSETS)][0 if run["s"] > 0 else 1]
                axes.annotate(
                    f"{run['s']:+g}", (run["perplexity"], run[key]), xytext=(right, up), textcoords="offset points",
                    ha=("right", "center", "left")[(right > 0) - (right < 0) + 1], va="bottom" if up > 0 else "top",
                    fontsize=8, color=line.get_color(), path_effects=[withStroke(linewidth=2.5, foreground="white")],
                )  # fmt: skip
        # Without training s = 0 is the bare model.
        for run in (run for run in runs if run["method"] == "braces" and run["s"] == 0):
            axes.plot(run["perplexity"], run[key], "*", color="black", markersize=14, label="unsteered model")
        axes.set_title(f"Positive according to {title}", fontsize="medium")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        percent_ticks(axes.yaxis)
        axes.margins(x=0.08, y=0.1)
        axes.grid(alpha=0.3)
        axes.set_xlabel("perplexity under the unsteered model (log scale)")
        axes.set_ylabel("share of continuations")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(drawn, path)


if __name__ == "__main__":
    main()
