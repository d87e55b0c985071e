"""`braces inspect clamp`: hold neurons at a value and see what the model says then."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import options as o
from braces_cli.cli.console import print_json, print_table, progress, set_up
from braces_cli.core.utils.errors import ConfigError


def clamp(
    ctx: typer.Context,
    clamps: Annotated[
        list[str],
        typer.Argument(
            metavar="LAYER:INDEX=VALUE...",
            help="Neurons to hold, such as 3:89=2.5, or 3:89=p99.9: at that percentile of its own weights over --data.",
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Repeatable. Default: standard input.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="One a line, or JSON Lines with `prompt`.")] = None,
    token: Annotated[
        list[str] | None, typer.Option("--token", help="Token whose probability is shown in any case. Repeatable.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Also continue each prompt, without and with.")] = False,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Texts for percentiles: file or hub set. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows of --data to read.")] = 1000,
    model: o.Model = None,
    adapter: o.AdapterName = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Tokens that rise most.")] = 10,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of a continuation.")] = 30,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p")] = 0.9,
    seed: o.Seed = 0,
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
    """Hold neurons at a value while scoring or continuing prompts, and show whose probability that changes.

    A value is a number, or a percentile of the neuron's own weights over the texts of --data.
    """
    set_up(quiet, debug)
    from braces_cli.inspection.neuron_clamping import parse_clamp

    held = [parse_clamp(text) for text in clamps]
    check_data(held, data)
    with progress(quiet) as report:
        found = _clamp(ctx, held, report)
    if fmt is o.Format.json:
        print_json(found)
        return
    if data:
        rows = [(f"{c['layer']}:{c['index']}", c.get("percentile"), c["value"]) for c in found["clamps"]]
        print_table("", ["neuron", "percentile", "value"], rows)
    for row in found["prompts"]:
        title = f"{row['prompt']!r}: KL {row['kl']:.3g} nats behind the prompt, {row['kl_mean']:.3g} over its positions"
        table = [(repr(t["token"])[1:-1], t["before"], t["after"], t["ratio"]) for t in row["tokens"]]
        print_table(title, ["token", "before", "after", "ratio"], table)
        if "text" in row:
            print_table("", ["", "continuation"], [("before", row["text_before"]), ("after", row["text"])])


def check_data(held: list[Any], data: list[str] | None) -> None:
    """Raises:
    ConfigError: a percentile without texts to take it over, or texts without a percentile.
    """
    percentiles = any(one.percentile is not None for one in held)
    if percentiles and not data:
        hint = "Give texts of the model's kind: --data FILE."
        raise ConfigError("a percentile of what?", where="--data", hint=hint)
    if data and not percentiles:
        hint = "Write LAYER:INDEX=p99.9, or leave --data out."
        raise ConfigError("no clamp is a percentile", where="--data", hint=hint)


def _clamp(ctx: typer.Context, held: list[Any], report: Any) -> dict[str, Any]:
    from braces_cli.core.models.generation import Sampling
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.ffn_weights import plain_ffns
    from braces_cli.inspection.neuron_clamping import check_clamps, clamp_prompt
    from braces_cli.steering.prompts import read_prompts

    params = ctx.params
    sampling = Sampling(params["max_new_tokens"], params["temperature"], params["top_p"], None, params["seed"])
    texts = list(read_prompts(params["prompt"] or (), params["prompts"], sys.stdin))
    session = open_session(params["model"], params["adapter"], o.load_options(ctx))
    check_clamps(plain_ffns(session.ffns), held)
    if params["data"]:
        from braces_cli.inspection.activation_percentiles import read_texts, resolve_percentiles

        held = resolve_percentiles(session, held, read_texts(session, params["data"], params["limit"]), report)
    known = vocabulary(session) if params["token"] else None
    tokens = [known.single(text, "--token") for text in params["token"] or () if known]
    rows = []
    for done, text in enumerate(texts):
        report("clamping", done, len(texts))
        row = clamp_prompt(session, text, held, tokens=tokens, top_k=params["top_k"])
        rows.append(row | (_continue(session, text, done, held, sampling) if params["generate"] else {}))
    return {"clamps": [one.as_row() for one in held], "prompts": rows}


def _continue(session: Any, prompt: str, index: int, held: list[Any], sampling: Any) -> dict[str, str]:
    from braces_cli.core.models.generation import Job, generate
    from braces_cli.inspection.ffn_weights import plain_ffns
    from braces_cli.inspection.neuron_clamping import clamped

    job, base = Job(prompt, index), session.base
    before = generate(base.model, base.tokenizer, [job], sampling)[0]
    with clamped(plain_ffns(session.ffns), held):
        return {"text_before": before, "text": generate(base.model, base.tokenizer, [job], sampling)[0]}
