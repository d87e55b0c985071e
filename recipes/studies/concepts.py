"""Do single value vectors stand for concepts, and does holding such a neuron bring the concept about?

Run     python recipes/studies/concepts.py --model M --sentences FILE.jsonl [--words happy,water,...]
Needs   a causal LM that a CPU runs in memory, and texts (one a line, or JSON Lines with `text`)
Shows   one JSON document.
        `hits`: value vectors among whose first 1 or 3 tokens the concept is, beside random vectors of the same norms
        (mean and standard deviation over the draws), and how many concepts are found at all.
        `clamps`: neurons held at a percentile of their own weights over the sentences, and at multiples of it. Chosen
        among the vectors that rank the concept first to third by rank, and by expected effect; among such vectors with
        the sign turned, which are held at the low end; and by expected effect among all vectors. `ratio` is that of the
        mean probability over all positions, `geometric` of the geometric mean, `last` of the last position when the
        neuron is held there alone; `kl` is KL(before || after) in nats, a mean over positions.

The expected effect on the log-probability of the concept is (value - mean weight) v . (u_c - sum_t p_t u_t): u_t is
what the final norm, its scale frozen at a median position, and the head make of token t, p the mean distribution.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.padding import by_length, pad_right
from braces_cli.core.models.tokenization import encode
from braces_cli.core.session import Session, open_session
from braces_cli.inspection.concept_search import model_concept, vocabulary
from braces_cli.inspection.concept_tokens import Concept
from braces_cli.inspection.direct_effects import direction
from braces_cli.inspection.logit_lens import LogitLens
from braces_cli.inspection.neuron_clamping import divergence

WORDS = "happy,water,dog,king,red,money,music,night,school,death"
FIRST = (1, 3)  # places that count as found
PERCENTILE = 99.9
TOKENS = 64  # of a sentence at most
TIMES = (1.0, 2.0, 4.0, 8.0)
WHOLE = "expected effect"  # the choice that is held at all multiples, the others at the percentile alone


@dataclass
class Seen:
    """What the bare model does on the sentences.

    Attributes:
        before: log-probabilities of the next token, (positions, vocabulary) for each batch: a matter of memory.
        high, low: percentiles of each neuron's weights, (neurons,) over all layers; `mean` beside them.
        logs: log-probability of each concept at each position, (positions, concepts).
        last: which positions are the last of their sentence.
        effect: first-order change of a concept's log-probability by each value vector at weight 1, (neurons, concepts).
    """

    batches: list[dict[str, Tensor]]
    before: list[Tensor]
    high: Tensor
    low: Tensor
    mean: Tensor
    logs: Tensor
    last: Tensor
    effect: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="sentences to use")
    parser.add_argument("--words", default=WORDS)
    parser.add_argument("--draws", type=int, default=20, help="sets of random vectors")
    args = parser.parse_args()
    session = open_session(args.model, None, LoadOptions(dtype="float32"))
    known = vocabulary(session)
    concepts = {word: model_concept(session, [word], known) for word in args.words.split(",")}
    batches = sentences(session, args.sentences, args.count)
    values = torch.cat([ffn.value_matrix().mT.detach() for ffn in session.ffns])
    found = hits(session, values, concepts, args.draws)
    print(json.dumps(found), file=sys.stderr, flush=True)
    seen = observe(session, values, concepts, batches)
    rows = []
    for number, (word, wanted) in enumerate(concepts.items()):
        known_rows: dict[Any, dict[str, Any]] = {}
        for how, *held in choices(session, values, wanted, seen, number):
            if tuple(held) not in known_rows:
                times = TIMES if how == WHOLE else TIMES[:1]
                known_rows[tuple(held)] = measure(session, seen, number, wanted, *held, times)
            rows.append({"word": word, "chosen_by": how} | known_rows[tuple(held)])
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    settings = {"sentences": args.count, "positions": len(seen.logs), "draws": args.draws, "percentile": PERCENTILE}
    json.dump({"settings": settings, "hits": found, "summary": summary(rows), "clamps": rows}, sys.stdout, indent=2)
    print()


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each way to choose: neurons, and how many raise their concept threefold at each multiple."""
    out = {}
    for how in dict.fromkeys(row["chosen_by"] for row in rows):
        own = [row for row in rows if row["chosen_by"] == how]
        raised = {
            f"{times:g}": sum(at["ratio"] >= 3 for row in own for at in row["clamped"] if at["times"] == times)
            for times in (TIMES if how == WHOLE else TIMES[:1])
        }
        out[how] = {"neurons": len(own), "raised_threefold_at": raised}
    return out


def sentences(session: Session, path: Path, count: int) -> list[dict[str, Tensor]]:
    """The first `count` texts, tokenised, in batches."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    texts = [json.loads(line)["text"] if path.suffix == ".jsonl" else line for line in lines]
    tokenizer = session.base.tokenizer
    examples = [encode(tokenizer, text, max_length=TOKENS) for text in texts]
    groups = by_length(examples, 32)
    return [pad_right([examples[index] for index in group], tokenizer.pad_token_id) for group in groups]


def hits(session: Session, values: Tensor, concepts: dict[str, Concept], draws: int) -> dict[str, Any]:
    """How many vectors hold each concept among their first tokens, of value vectors and of random ones."""
    lens, generator = LogitLens(session.base.model), torch.Generator().manual_seed(0)

    def count(vectors: Tensor) -> list[list[int]]:
        best = lens.best(vectors, max(FIRST))[1]
        ids = [torch.tensor(wanted.tokens) for wanted in concepts.values()]
        return [[int(torch.isin(best[:, :first], own).any(dim=1).sum()) for own in ids] for first in FIRST]

    own, random = count(values), []
    for _ in range(draws):
        noise = torch.randn(values.shape, generator=generator)
        random.append(count(noise * (values.norm(dim=1) / noise.norm(dim=1))[:, None]))
    out: dict[str, Any] = {"vectors": len(values)}
    for place, first in enumerate(FIRST):
        each = {word: beside(own[place][i], [r[place][i] for r in random]) for i, word in enumerate(concepts)}
        found = beside(sum(n > 0 for n in own[place]), [sum(n > 0 for n in r[place]) for r in random])
        total = beside(sum(own[place]), [sum(r[place]) for r in random])
        out[f"rank<={first}"] = {"total": total, "concepts_found": found, "by_concept": each}
    return out


def beside(own: int, random: list[int]) -> dict[str, float | None]:
    mean = statistics.fmean(random)
    return {
        "own": own,
        "random_mean": mean,
        "random_sd": statistics.stdev(random),
        "ratio": own / mean if mean else None,
    }


def observe(session: Session, values: Tensor, concepts: dict[str, Concept], batches: list[dict[str, Tensor]]) -> Seen:
    """One pass over the sentences, keeping every neuron's weights."""
    lens = LogitLens(session.base.model)
    ids = [torch.tensor(wanted.tokens) for wanted in concepts.values()]
    weights: dict[int, list[Tensor]] = {ffn.layer: [] for ffn in session.ffns}
    streams: list[Tensor] = []
    handles = [
        ffn.value.register_forward_pre_hook(lambda module, args, kept=weights[ffn.layer]: kept.append(args[0]))
        for ffn in session.ffns
    ]
    handles.append(lens.norm.register_forward_pre_hook(lambda module, args: streams.append(args[0])))
    before, logs, last, mean_p = [], [], [], torch.zeros(lens.vocabulary, dtype=torch.float64)
    for batch in batches:
        found = log_probabilities(session, batch)
        before.append(found)
        mean_p += found.exp().double().sum(dim=0)
        logs.append(of_concepts(found, ids))
        last.append(ends(batch["attention_mask"])[batch["attention_mask"].bool()])
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    whole = [torch.cat([w[mask] for w, mask in zip(kept, masks, strict=True)]) for kept in weights.values()]
    stream = torch.cat([s[mask] for s, mask in zip(streams, masks, strict=True)])
    # At one position, the one of median length: scales differ little, and the order of neurons not at all.
    middle = stream[stream.norm(dim=1).argsort()[len(stream) // 2]]
    u = direction(lens, middle.expand(lens.vocabulary, -1), list(range(lens.vocabulary))).u
    p = (mean_p / len(stream)).float()
    towards = torch.stack([(p[own] @ u[own]) / p[own].sum() - p @ u for own in ids])
    low, high = torch.cat([-tail(-w) for w in whole]), torch.cat([tail(w) for w in whole])
    mean = torch.cat([w.mean(dim=0) for w in whole])
    return Seen(batches, before, high, low, mean, torch.cat(logs), torch.cat(last), values.float() @ towards.mT)


def tail(weights: Tensor) -> Tensor:
    """The percentile of each neuron, (positions, neurons) -> (neurons,), linear between two weights."""
    place = (len(weights) - 1) * (1 - PERCENTILE / 100)  # from the top: nothing below has to be sorted
    top = weights.T.contiguous().topk(min(int(place) + 2, len(weights)), dim=1).values
    low = top[:, min(int(place) + 1, top.shape[1] - 1)]
    return top[:, int(place)] + (low - top[:, int(place)]) * (place - int(place))


def choices(
    session: Session, values: Tensor, wanted: Concept, seen: Seen, number: int
) -> Iterator[tuple[str, int, float]]:
    """(how chosen, neuron, value) of what is worth holding for a concept."""
    lens = LogitLens(session.base.model)
    effect = seen.effect[:, number]
    up, down = (seen.high - seen.mean) * effect, (seen.low - seen.mean) * effect
    for sign, name, expected, value in ((1, "", up, seen.high), (-1, "turned, ", down, seen.low)):
        ranks = lens.ranks(sign * values, wanted.tokens)[0].amin(dim=1)
        some = (ranks <= max(FIRST)).nonzero().squeeze(1)
        if len(some):
            if sign == 1:  # the order of places alone, as `inspect find` has it but for scores
                first = int(some[ranks[some].argmin()])
            best = int(some[expected[some].argmax()])
            yield f"{name}{WHOLE}", best, float(value[best])
            if sign == 1:
                yield "rank", first, float(value[first])
    both = torch.maximum(up, down)
    best = int(both.argmax())
    yield "expected effect among all", best, float((seen.high if up[best] >= down[best] else seen.low)[best])


def measure(
    session: Session,
    seen: Seen,
    number: int,
    wanted: Concept,
    neuron: int,
    value: float,
    multiples: Sequence[float],
) -> dict[str, Any]:
    """Hold a neuron at multiples of a value and compare the concept's probability at every position."""
    ffn, index = place(session, neuron)
    vector = ffn.value_matrix()[:, index].detach()[None]
    ranks = [int(LogitLens(session.base.model).ranks(sign * vector, wanted.tokens)[0].min()) for sign in (1, -1)]
    old, rows = seen.logs[:, number], []
    for times in multiples:
        with hold(ffn, index, times * value):
            new, kl = compare(session, wanted, seen)
        rows.append({"times": times, "probability": float(new.exp().mean())} | ratios(old, new) | {"kl": kl})
    at_last = None
    if len(multiples) > 1:
        with hold(ffn, index, value, ends):
            new, _ = compare(session, wanted, seen)
        at_last = ratios(old[seen.last], new[seen.last])
    return {
        "layer": ffn.layer,
        "index": index,
        "rank": ranks[0],
        "rank_turned": ranks[1],
        "value": value,
        "mean_weight": float(seen.mean[neuron]),
        "expected": float((value - seen.mean[neuron]) * seen.effect[neuron, number]),
        "probability": float(old.exp().mean()),
        "clamped": rows,
        "last": at_last,
    }


def ratios(old: Tensor, new: Tensor) -> dict[str, float]:
    """Of log-probabilities: how many times the arithmetic and the geometric mean of the probabilities rose."""
    return {
        "ratio": float(new.exp().mean() / old.exp().mean()),
        "geometric": float((new - old).mean().exp()),
    }


def place(session: Session, neuron: int) -> tuple[Any, int]:
    """The FFN and the index within it of a row of all value vectors."""
    for ffn in session.ffns:
        if neuron < ffn.value_vectors:
            return ffn, neuron
        neuron -= ffn.value_vectors
    raise IndexError(neuron)


@contextmanager
def hold(ffn: Any, index: int, value: float, where: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """As `inspection.neuron_clamping.clamped`, but only at some positions: those of `where(attention mask)`."""

    def hook(module: Any, args: tuple) -> tuple:
        weights = args[0].clone()
        if where is None:
            weights[..., index] = value
        else:
            weights[..., index][where(MASK[0])] = value
        return (weights,)

    handle = ffn.value.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


MASK: list[Tensor] = [torch.empty(0)]  # of the batch that runs


def ends(mask: Tensor) -> Tensor:
    """The last real position of each row, as a mask."""
    return mask.bool() & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))


def compare(session: Session, wanted: Concept, seen: Seen) -> tuple[Tensor, float]:
    """Log-probability of the concept at each position, and the mean KL(before || now)."""
    ids, logs, kl = [torch.tensor(wanted.tokens)], [], 0.0
    for batch, old in zip(seen.batches, seen.before, strict=True):
        new = log_probabilities(session, batch)
        kl += float(divergence(old, new).double().sum())
        logs.append(of_concepts(new, ids)[:, 0])
    found = torch.cat(logs)
    return found, kl / len(found)


def of_concepts(log_probabilities: Tensor, ids: list[Tensor]) -> Tensor:
    """Log-probability of any of a concept's tokens, (positions, concepts)."""
    return torch.stack([log_probabilities[:, own].logsumexp(dim=1) for own in ids], dim=1)


def log_probabilities(session: Session, batch: dict[str, Tensor]) -> Tensor:
    """Of the next token at all real positions of a batch, (positions, vocabulary)."""
    MASK[0] = batch["attention_mask"]
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = session.base.model(**inputs, use_cache=False).logits
    return logits[batch["attention_mask"].bool()].float().log_softmax(dim=-1)


if __name__ == "__main__":
    main()
