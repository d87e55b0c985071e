"""`braces inspect clamp`: hold neurons at a value and see what the model says then."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, print_table, progress
from braces_cli.cli.inspect_options import InspectSettings
from braces_cli.core.utils.errors import ConfigError
from braces_cli.core.utils.settings import DATA, GENERATION, SeedSettings, option


@dataclass(frozen=True, kw_only=True)
class ClampSettings(InspectSettings, SeedSettings):
    """Settings of `braces inspect clamp`."""

    first_options = ("prompt", "model", "adapter", "token", "generate")

    clamps: tuple[str, ...] = option(
        help="Neurons to clamp, such as 3:89=2.5, or 3:89=p99.9 for that percentile of the neuron's weights over "
        "--data.",
        metavar="LAYER:INDEX=VALUE",
        argument=True,
    )
    prompt: tuple[str, ...] = option((), help="Text to continue. Repeatable. Default: standard input.", metavar="TEXT")
    prompts: Path | None = option(None, help="File with prompts: one per line, or JSON Lines with `prompt`.")
    token: tuple[str, ...] = option((), help="Token that is always shown. Repeatable.", metavar="TOKEN")
    top_k: int = option(10, help="Number of tokens to show: those whose probability rises most.", min=1)
    data: tuple[str, ...] = option(
        (), help="Texts for percentiles: file or hub data set. Repeatable.", metavar="SOURCE", panel=DATA
    )
    limit: int = option(1000, help="Number of rows of --data to read.", min=1, panel=DATA)
    generate: bool = option(
        False, help="Also generate a continuation of each prompt, without and with the clamps.", panel=GENERATION
    )
    max_new_tokens: int = option(30, help="Maximum number of new tokens.", min=1, panel=GENERATION)
    temperature: float = option(0.0, help="Sampling temperature; 0 is greedy.", panel=GENERATION)
    top_p: float = option(
        0.9, help="Nucleus sampling: total probability of the tokens to sample from.", panel=GENERATION
    )


@command
def clamp(settings: ClampSettings) -> None:
    """Hold neurons at a value while scoring or continuing prompts, and show whose probability that changes.

    A value is a number, or a percentile of the neuron's own weights over the texts of --data.
    """
    from braces_cli.inspection.neuron_clamping import parse_clamp

    clamps = [parse_clamp(text) for text in settings.clamps]
    check_data(clamps, settings.data)
    with progress(settings.quiet) as report:
        result = _clamp(settings, clamps, report)
    if settings.json:
        print_json(result)
        return
    if settings.data:
        rows = [(f"{c['layer']}:{c['index']}", c.get("percentile"), c["value"]) for c in result["clamps"]]
        print_table("", ["neuron", "percentile", "value"], rows)
    for row in result["prompts"]:
        title = f"{row['prompt']!r}: KL {row['kl']:.3g} nats behind the prompt, {row['kl_mean']:.3g} over its positions"
        table = [(repr(t["token"])[1:-1], t["before"], t["after"], t["ratio"]) for t in row["tokens"]]
        print_table(title, ["token", "before", "after", "ratio"], table)
        if "text" in row:
            print_table("", ["", "continuation"], [("before", row["text_before"]), ("after", row["text"])])


def check_data(clamps: Sequence[Any], data: Sequence[str]) -> None:
    """Raises:
    ConfigError: a percentile without texts to take it over, or texts without a percentile.
    """
    percentiles = any(clamp.percentile is not None for clamp in clamps)
    if percentiles and not data:
        hint = "Give texts of the model's kind: --data FILE."
        raise ConfigError("a percentile needs texts to take it over", where="--data", hint=hint)
    if data and not percentiles:
        hint = "Write LAYER:INDEX=p99.9, or leave --data out."
        raise ConfigError("no clamp is a percentile", where="--data", hint=hint)


def _clamp(settings: ClampSettings, clamps: Sequence[Any], report: Any) -> dict[str, Any]:
    from braces_cli.core.models.generation import Sampling
    from braces_cli.core.session import open_session
    from braces_cli.inspection.concept_search import vocabulary
    from braces_cli.inspection.ffn_weights import plain_ffns
    from braces_cli.inspection.neuron_clamping import check_clamps, clamp_prompt
    from braces_cli.steering.prompts import read_prompts

    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, None, settings.seed)
    texts = list(read_prompts(settings.prompt, settings.prompts, sys.stdin))
    session = open_session(settings.model, settings.adapter, settings.load_options)
    check_clamps(plain_ffns(session.ffns), clamps)
    if settings.data:
        from braces_cli.inspection.activation_percentiles import read_texts, resolve_percentiles

        clamps = resolve_percentiles(session, clamps, read_texts(session, settings.data, settings.limit), report)
    known = vocabulary(session) if settings.token else None
    tokens = [known.single(text, "--token") for text in settings.token if known]
    rows = []
    for done, text in enumerate(texts):
        report("clamping", done, len(texts))
        row = clamp_prompt(session, text, clamps, tokens=tokens, top_k=settings.top_k)
        rows.append(row | (_continue(session, text, done, clamps, sampling) if settings.generate else {}))
    return {"clamps": [clamp.as_row() for clamp in clamps], "prompts": rows}


def _continue(session: Any, prompt: str, index: int, clamps: Sequence[Any], sampling: Any) -> dict[str, str]:
    from braces_cli.core.models.generation import TextRequest, generate
    from braces_cli.inspection.ffn_weights import plain_ffns
    from braces_cli.inspection.neuron_clamping import clamped

    job, base = TextRequest(prompt, index), session.base
    before = generate(base.model, base.tokenizer, [job], sampling)[0]
    with clamped(plain_ffns(session.ffns), clamps):
        return {"text_before": before, "text": generate(base.model, base.tokenizer, [job], sampling)[0]}
