"""`braces inspect trace`: the sub-updates that made the model say a token."""

from dataclasses import dataclass
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_table, progress
from braces_cli.cli.inspect_options import LayerSettings, tokens_cell
from braces_cli.core.utils.settings import option


@dataclass(frozen=True, kw_only=True)
class TraceSettings(LayerSettings):
    """Settings of `braces inspect trace`."""

    first_options = ("model", "adapter", "target", "layers", "positions")

    prompt: str = option(help="Input text.", metavar="PROMPT", argument=True)
    target: str | None = option(
        None, help="Token whose logit is decomposed. Default: the model's next token at each position."
    )
    positions: str | None = option(
        None, help="Positions, such as 3-5,7 (from 0). Default: the last; all with --format json."
    )
    limit: int = option(5, help="Number of sub-updates per layer and position.", min=1)
    top_k: int = option(5, help="Number of tokens per sub-update.", min=1)


@command
def trace(settings: TraceSettings) -> None:
    """The sub-updates that matter most to a token's logit, by layer and position; base and adapter side by side.

    An effect is what a sub-update adds to the logit on the direct path to the head, with the scale of the final norm
    held at its value. Embedding, attention, sub-updates and biases add up to the logit.
    """
    with progress(settings.quiet) as report:
        traced = _trace(settings, report)
    if settings.json:
        print_json(traced)
        return
    # Without an adapter there is no base to compare with.
    adapted = traced["positions"][-1]["base_logit"] is not None
    heads = ["logit", "embedding", "attention", "sub_updates", "biases", *(["base_logit"] if adapted else [])]
    table = [(p["position"], p["token"], p["target"]["token"], *(p[h] for h in heads)) for p in traced["positions"]]
    print_table("", ["position", "token", "target", *(name.replace("_", " ") for name in heads)], table)
    names = ["index", "weight", *(["relevance", "gated"] if adapted else []), "effect"]
    names += ["base_effect"] if adapted else []
    rows = [
        (row["layer"], row["position"], *(update[name] for name in names), tokens_cell(update))
        for row in traced["layers"]
        for update in row["sub_updates"]
    ]
    columns = [name.replace("_", " ").replace("gated", "g r") for name in names]
    print_table("", ["layer", "position", *columns, "tokens"], rows)


def _trace(settings: TraceSettings, report: Any) -> dict[str, Any]:
    from braces_cli.core.models.layer_ranges import chosen_layers, parse_ranges
    from braces_cli.core.models.tokenization import encode
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.logit_attribution import trace as run

    session = open_session(settings.model, settings.adapter, settings.load_options)
    layers = chosen_layers(session.base.model, settings.layers)
    count = len(encode(session.base.tokenizer, settings.prompt).ids)
    positions = None if settings.json else [count - 1]
    if settings.positions is not None:
        positions = parse_ranges(settings.positions, count, "--positions")
    target = None
    if settings.target is not None:
        target = vocabulary(session).single(settings.target, "--target")
    return run(
        session,
        settings.prompt,
        target=target,
        layers=layers,
        positions=positions,
        top=settings.limit,
        top_k=settings.top_k,
        report=report,
    )
