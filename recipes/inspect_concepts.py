"""Do single value vectors stand for concepts, and does holding such a neuron bring the concept about?

Run     python recipes/inspect_concepts.py --model M --sentences FILE.jsonl [--words happy,water,...]
Needs   a causal LM, and texts (one a line, or JSON Lines with `text`); minutes on a CPU for a small model
Shows   one JSON document. `ranked`: concepts that are among the first three tokens of at least one value vector, beside
        as many random vectors of the same norms (several draws); `hits` counts such vectors. `clamps`: for each concept
        its best vector held at its own 99.9th percentile over the sentences, how many times more likely the concept
        becomes (mean over all positions of all sentences), and KL(before || after) in nats.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from braces_cli.core.batches import by_length, pad_right
from braces_cli.core.encode import encode
from braces_cli.core.session import LoadOptions, Session, open_session
from braces_cli.inspection.clamp import Clamp, clamped, divergence
from braces_cli.inspection.concepts import Concept
from braces_cli.inspection.find import model_concept, promote, vocabulary
from braces_cli.inspection.readout import readout

WORDS = "happy,water,dog,king,red,money,music,night,school,death"
FIRST = 3  # places that count as found
PERCENTILE = 0.999
TOKENS = 64  # of a sentence at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000, help="sentences to use")
    parser.add_argument("--words", default=WORDS)
    parser.add_argument("--draws", type=int, default=10, help="sets of random vectors")
    args = parser.parse_args()
    session = open_session(args.model, None, LoadOptions(dtype="float32"))
    known = vocabulary(session)
    concepts = {word: model_concept(session, [word], known) for word in args.words.split(",")}
    batches = sentences(session, args.sentences, args.count)
    ranked = ranks(session, concepts, args.draws)
    clamps = [clamp(session, word, wanted, batches) for word, wanted in concepts.items()]
    found = [row for row in clamps if row["rank"] <= FIRST]
    summary = {
        "found": len(found),
        "found_random_mean": sum(ranked["found_random"]) / args.draws,
        "raised_threefold": sum(row["ratio"] >= 3 for row in found),
        "raised_threefold_of_all": sum(row["ratio"] >= 3 for row in clamps),
    }
    settings = {"sentences": args.count, "draws": args.draws, "first": FIRST, "percentile": PERCENTILE}
    json.dump({"settings": settings, "summary": summary, "ranked": ranked, "clamps": clamps}, sys.stdout, indent=2)
    print()


def sentences(session: Session, path: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """The first `count` texts, tokenised, in batches."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    texts = [json.loads(line)["text"] if path.suffix == ".jsonl" else line for line in lines]
    tokenizer = session.base.tokenizer
    examples = [encode(tokenizer, text, max_length=TOKENS) for text in texts]
    groups = by_length(examples, 32)
    return [pad_right([examples[index] for index in group], tokenizer.pad_token_id) for group in groups]


def ranks(session: Session, concepts: dict[str, Concept], draws: int) -> dict[str, Any]:
    """How many concepts, and how many vectors for each, are found among value vectors and among random ones."""
    score = readout(session.base.model)
    values = torch.cat([ffn.value_matrix().mT.detach() for ffn in session.ffns])
    generator = torch.Generator().manual_seed(0)

    def hits(vectors: torch.Tensor) -> list[int]:
        found = score.best(vectors, FIRST)[1]
        return [int(torch.isin(found, torch.tensor(wanted.tokens)).any(dim=1).sum()) for wanted in concepts.values()]

    own, random = hits(values), []
    for _ in range(draws):
        noise = torch.randn(values.shape, generator=generator)
        random.append(hits(noise * (values.norm(dim=1) / noise.norm(dim=1))[:, None]))
    return {
        "vectors": len(values),
        "found_random": [sum(count > 0 for count in counts) for counts in random],
        "hits": dict(zip(concepts, own, strict=True)),
        "hits_random_mean": {word: sum(c[i] for c in random) / draws for i, word in enumerate(concepts)},
    }


def clamp(session: Session, word: str, wanted: Concept, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Hold the best vector of a concept at its own 99.9th percentile and compare."""
    best = promote(session, wanted, limit=1, top_k=5)[0]
    ffn = next(ffn for ffn in session.ffns if ffn.layer == best["layer"])
    seen: list[torch.Tensor] = []
    handle = ffn.value.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., best["index"]]))
    for batch in batches:
        log_probabilities(session, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    weights = torch.cat([weight[mask] for weight, mask in zip(seen, masks, strict=True)])
    value = float(weights.quantile(PERCENTILE))
    tokens = torch.tensor(wanted.tokens)
    sums = torch.zeros(3, dtype=torch.float64)
    held = [Clamp(best["layer"], best["index"], value)]
    for batch, mask in zip(batches, masks, strict=True):
        # Both at a time: all distributions over all sentences would not fit.
        old = log_probabilities(session, batch)[mask]
        with clamped(session.ffns, held):
            new = log_probabilities(session, batch)[mask]
        sums[0] += old[:, tokens].exp().sum()
        sums[1] += new[:, tokens].exp().sum()
        sums[2] += divergence(old, new).sum()
    old_p, new_p, kl = (sums / len(weights)).tolist()
    print(f"{word}: {new_p / old_p:.2f}", file=sys.stderr)
    return {
        "word": word,
        **{key: best[key] for key in ("layer", "index", "rank")},
        "tokens": [token["token"] for token in best["tokens"]],
        "value": value,
        "probability": old_p,
        "probability_clamped": new_p,
        "ratio": new_p / old_p,
        "kl": kl,
    }


def log_probabilities(session: Session, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return session.base.model(**inputs, use_cache=False).logits.float().log_softmax(dim=-1)


if __name__ == "__main__":
    main()
