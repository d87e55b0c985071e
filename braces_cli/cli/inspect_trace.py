"""`braces inspect trace`: the sub-updates that made the model say a token."""

from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, progress, set_up
from braces_cli.cli.inspect_values import tokens


def trace(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to run through the model.")],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Token whose logit is taken apart. Default: the model's own next, everywhere."),
    ] = None,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    layers: o.Layers = None,
    positions: Annotated[
        str | None,
        typer.Option("--positions", help="Such as 3-5,7 (from 0). Default: the last; with --format json all."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Sub-updates for each layer and position.")] = 5,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens shown for each sub-update.")] = 5,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """The sub-updates that matter most to a token's logit, by layer and position; base and adapter side by side.

    An effect is what a sub-update adds to the logit on the straight way to the head, the final norm's scale held at
    its value. Embedding, attention, sub-updates and biases add up to the logit.
    """
    set_up(quiet, debug)
    with progress(quiet) as report:
        found = _trace(ctx, report)
    if fmt is o.Format.json:
        print_json(found)
        return
    # Without an adapter there is nothing to stand beside.
    adapted = found["positions"][-1]["base_logit"] is not None
    names = ["index", "weight", *(["relevance", "gated"] if adapted else []), "effect"]
    names += ["base_effect"] if adapted else []
    rows = [
        (row["layer"], row["position"], *(s[name] for name in names), tokens(s))
        for row in found["layers"]
        for s in row["sub_updates"]
    ]
    heads = ["logit", "embedding", "attention", "sub_updates", "biases", *(["base_logit"] if adapted else [])]
    table = [(p["position"], p["token"], p["target"]["token"], *(p[h] for h in heads)) for p in found["positions"]]
    print_table("", ["position", "token", "target", *(name.replace("_", " ") for name in heads)], table)
    columns = [name.replace("_", " ").replace("gated", "g r") for name in names]
    print_table("", ["layer", "position", *columns, "tokens"], rows)


def _trace(ctx: typer.Context, report: Any) -> dict[str, Any]:
    from braces_cli.core.models.layer_ranges import chosen_layers, parse_ranges
    from braces_cli.core.models.tokenization import encode
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.logit_attribution import trace as run

    params = ctx.params
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    layers = chosen_layers(session.base.model, params["layers"])
    count = len(encode(session.base.tokenizer, params["prompt"]).ids)
    positions = None if params["fmt"] is o.Format.json else [count - 1]
    if params["positions"] is not None:
        positions = parse_ranges(params["positions"], count, "--positions")
    target = None
    if params["target"] is not None:
        target = vocabulary(session).single(params["target"], "--target")
    sizes = {"top": params["limit"], "top_k": params["top_k"]}
    return run(session, params["prompt"], target=target, layers=layers, positions=positions, **sizes, report=report)
