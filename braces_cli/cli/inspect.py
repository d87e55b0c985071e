"""`braces inspect` and its subcommands values, find, trace, clamp and report.

`find --map` imports no torch, so that it answers at once.
"""

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from braces_cli.cli.options import command
from braces_cli.cli.output import note, print_json, print_json_lines, print_result, print_table, progress
from braces_cli.core.attributes.options import AttributesFolder
from braces_cli.core.config import DATA, GENERATION, option, parse_ranges, same_option
from braces_cli.core.errors import ConfigError
from braces_cli.core.options import AdapterSettings, DisplaySettings, OverwriteSettings, Sampling, SeedSettings

if TYPE_CHECKING:
    from braces_cli.core.adapter.model import Session
    from braces_cli.inspection.clamp import Clamp
    from braces_cli.inspection.vocabulary import LogitLens


@dataclass(frozen=True, kw_only=True)
class LayerSettings(AdapterSettings, DisplaySettings):
    """Decoder layers to inspect.

    Attributes:
        layers: Decoder layers, such as 8-20,24 or 1- (inclusive, from 0). Default: all.
    """

    layers: str | None = option(None)


def _open(settings: AdapterSettings) -> "tuple[Session, LogitLens]":
    from braces_cli.core.adapter.model import open_session
    from braces_cli.inspection.vocabulary import LogitLens

    session = open_session(settings.model, settings.adapter, settings)
    return session, LogitLens(session.base)


def _chosen_ffns(session: "Session", settings: LayerSettings) -> list[Any]:
    from braces_cli.core.models.ffn import chosen_layers

    layers = chosen_layers(session.base.model, settings.layers)
    return [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]


def tokens_cell(row: Mapping[str, Any]) -> str:
    """The tokens of a row in one cell, with escapes for newlines and control characters."""
    return "  ".join(repr(token["token"])[1:-1] for token in row["tokens"])


# Maximum number of rows in a table; JSON Lines have all rows.
SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class ValuesSettings(OverwriteSettings, LayerSettings):
    """Settings of `braces inspect values`.

    Attributes:
        index: Vectors within each layer, such as 0-9,42. Default: all.
        top_k: Number of tokens per vector.
        output: Map file to write, .parquet; `inspect find --map` searches it.
    """

    first_options = ("model", "adapter", "layers", "index", "output")

    index: str | None = option(None)
    top_k: int = option(10, min=1)
    output: Path | None = option(None)


@command
def values(settings: ValuesSettings) -> None:
    """The vocabulary tokens that each value vector promotes, best first.

    In a mixture of experts the index continues from expert to expert.
    """
    from braces_cli.core.files import check_output_file, output_lock

    output = settings.output
    if output is not None and output.suffix != ".parquet":
        hint = "End it in .parquet; for JSON Lines leave --output out and add --format json."
        raise ConfigError(f"unknown kind of file `{output.name}`", where="--output", hint=hint)
    with output_lock(output), progress(settings.quiet) as report:
        if output is not None:
            check_output_file(output, settings.overwrite)
        from braces_cli.inspection.maps import write_map
        from braces_cli.inspection.vocabulary import map_header, value_tokens

        session, lens = _open(settings)
        ffns = _chosen_ffns(session, settings)
        count = max((ffn.value_vectors for ffn in ffns), default=0)
        indices = parse_ranges(settings.index, count, "--index") if settings.index else None
        rows = value_tokens(lens, ffns, indices, settings.top_k, report)
        if output is not None:
            header = map_header(session.base, lens, settings.top_k)
            vectors = write_map(output, header, rows)
            written = {name: header[name] for name in ("model", "top_k")}
            written |= {"output": str(output), "vectors": vectors, "bytes": output.stat().st_size}
            print_result(settings.json, "map written", written)
            return
        if settings.json:
            print_json_lines(rows)
            return
        shown = list(islice(rows, SHOWN + 1))
    table = [(row["layer"], row["index"], tokens_cell(row)) for row in shown[:SHOWN]]
    print_table("", ["layer", "index", "tokens"], table)
    if len(shown) > SHOWN:
        note(f"the first {SHOWN} vectors; --format json or --output gives all, --layers and --index choose")


@dataclass(frozen=True, kw_only=True)
class FindSettings(AttributesFolder, LayerSettings):
    """Settings of `braces inspect find`.

    Attributes:
        words: A word, several of one concept, or id:NUMBER.
        attribute: Attribute: rank the vectors by relevance to this attribute instead of words.
        map_file: Map file written by `inspect values --output`; needs no model.
        limit: Number of vectors to show.
        top_k: Number of tokens per vector.
    """

    first_options = ("model", "adapter", "attribute", "map_file", "limit")

    words: tuple[str, ...] = option((), metavar="TOKEN_OR_WORD", argument=True)
    attribute: str | None = option(None, metavar="NAME")
    map_file: Path | None = option(None, flag="--map")
    limit: int = option(20, min=1)
    top_k: int = option(10, min=1)


@command
def find(settings: FindSettings) -> None:
    """The vectors that promote a concept most, best first: by rank among all tokens, then by score.

    A word counts in every spelling that is one token: with and without a leading space, and capitalised. A word of
    several tokens has the mean of its tokens' ranks and scores, a concept of several words the mean of its words. In a
    map only vectors that list one of the tokens are found.
    """
    if bool(settings.words) == bool(settings.attribute):
        raise ConfigError("give either words or --attribute", where="find", hint="Such as: find happy joyful")
    if settings.attribute and settings.map_file:
        hint = "Relevance needs the model: leave --map out."
        raise ConfigError("an attribute cannot be found in a map", where="--map", hint=hint)
    if settings.map_file is not None:
        rows = _find_in_map(settings, settings.map_file)
    else:
        with progress(settings.quiet) as report:
            rows = _find_in_model(settings, report)
    if settings.json:
        print_json_lines(rows)
        return
    table = [(row["layer"], row["index"], row.get("rank"), row["score"], tokens_cell(row)) for row in rows]
    print_table("", ["layer", "index", "rank", "score", "tokens"], table)


def _find_in_map(settings: FindSettings, path: Path) -> list[dict[str, Any]]:
    """Search a map; if a model or adapter is named, check that the map belongs to the model."""
    from braces_cli.inspection.maps import Vocabulary, open_map

    source, tokenizer = open_map(path), None
    if settings.model or settings.adapter:
        from braces_cli.core.adapter.model import open_shape
        from braces_cli.core.models.load import load_tokenizer

        base, _ = open_shape(settings)
        tokenizer = load_tokenizer(base.name, revision=base.revision, trust_remote_code=settings.trust_remote_code)
        base.tokenizer = tokenizer
        source.check_base(base)
    layers = None
    if settings.layers is not None:
        layers = parse_ranges(settings.layers, source.header["base"]["layers"], "--layers")
    concept = Vocabulary(source.header["vocabulary"]).concept(settings.words, tokenizer)
    rows = source.search(concept, settings.limit, layers)
    return [row | {"tokens": row["tokens"][: settings.top_k]} for row in rows]


def _find_in_model(settings: FindSettings, report: Any) -> list[dict[str, Any]]:
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.ffn import chosen_layers
    from braces_cli.inspection.search import top_vectors_for_attribute, top_vectors_for_concept

    session, lens = _open(settings)
    limit, top_k = settings.limit, settings.top_k
    if settings.attribute is None:
        ffns = _chosen_ffns(session, settings)
        concept = lens.vocabulary.concept(settings.words, session.base.tokenizer)
        return top_vectors_for_concept(lens, ffns, concept, limit=limit, top_k=top_k, report=report)
    attribute = find_attribute(session, settings.attribute, settings.attributes, report)
    layers = chosen_layers(session.base.model, settings.layers)
    return top_vectors_for_attribute(session, lens, attribute, layers, limit=limit, top_k=top_k)


@dataclass(frozen=True, kw_only=True)
class TraceSettings(LayerSettings):
    """Settings of `braces inspect trace`.

    Attributes:
        prompt: Input text.
        target: Token whose logit is decomposed. Default: the model's next token at each position.
        positions: Positions, such as 3-5,7 (from 0). Default: the last; all with --format json.
        limit: Number of sub-updates per layer and position.
        top_k: Number of tokens per sub-update.
    """

    first_options = ("model", "adapter", "target", "layers", "positions")

    prompt: str = option(metavar="PROMPT", argument=True)
    target: str | None = option(None)
    positions: str | None = option(None)
    limit: int = option(5, min=1)
    top_k: int = option(5, min=1)


@command
def trace(settings: TraceSettings) -> None:
    """The sub-updates with the largest direct effect on a token's logit, with and without the adapter.

    The effect is on the direct path to the LM head, with the scale of the final norm held at its value. The effects of
    embedding, attention, sub-updates and biases add up to the logit.
    """
    from braces_cli.inspection import trace as tracing

    with progress(settings.quiet):
        session, lens = _open(settings)
        ids = tracing.prompt_ids(session, settings.prompt, "PROMPT")
        positions = None if settings.json else [len(ids) - 1]
        if settings.positions is not None:
            positions = parse_ranges(settings.positions, len(ids), "--positions")
        target = None if settings.target is None else lens.vocabulary.single(settings.target, "--target")
        layers = [ffn.layer for ffn in _chosen_ffns(session, settings)]
        listed = {"top": settings.limit, "top_k": settings.top_k}
        traced = tracing.trace(session, lens, ids, target=target, layers=layers, positions=positions, **listed)
    if settings.json:
        print_json({"prompt": settings.prompt, **traced})
        return
    adapted = session.adapter is not None
    names = ["position", "token", "target", "logit", "embedding", "attention", "sub_updates", "biases"]
    names += ["base_logit"] if adapted else []
    for row in traced["positions"]:
        row["target"] = row["target"]["token"]
    table = [[row[name] for name in names] for row in traced["positions"]]
    print_table("", [name.replace("_", " ") for name in names], table)
    names = ["index", "weight", *(["relevance", "gated"] if adapted else []), "effect"]
    names += ["base_effect"] if adapted else []
    rows = [
        (row["layer"], row["position"], *(update[name] for name in names), tokens_cell(update))
        for row in traced["layers"]
        for update in row["sub_updates"]
    ]
    columns = [name.replace("_", " ").replace("gated", "g r") for name in names]
    print_table("", ["layer", "position", *columns, "tokens"], rows)


@dataclass(frozen=True, kw_only=True)
class ClampSettings(AdapterSettings, DisplaySettings, SeedSettings):
    """Settings of `braces inspect clamp`.

    Attributes:
        clamps: Neurons to clamp, such as 3:89=2.5, or 3:89=p99.9 for that percentile of the neuron's weights over
            --data.
        prompt: Text to continue. Repeatable. Default: standard input.
        prompts: File with prompts: one per line, or JSON Lines with `prompt`.
        token: Token that is always shown. Repeatable.
        top_k: Number of tokens to show: those whose probability rises most.
        data: Texts for percentiles: file or hub data set. Repeatable.
        limit: Number of rows of --data to read.
        generate: Also generate a continuation of each prompt, without and with the clamps.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy.
    """

    first_options = ("prompt", "model", "adapter", "token", "generate")

    clamps: tuple[str, ...] = option(metavar="LAYER:INDEX=VALUE", argument=True)
    prompt: tuple[str, ...] = option((), metavar="TEXT")
    prompts: Path | None = option(None)
    token: tuple[str, ...] = option((), metavar="TOKEN")
    top_k: int = option(10, min=1)
    data: tuple[str, ...] = option((), metavar="SOURCE", panel=DATA)
    limit: int = option(1000, min=1, panel=DATA)
    generate: bool = option(False, panel=GENERATION)
    max_new_tokens: int = option(30, min=1, panel=GENERATION)
    temperature: float = option(0.0, min=0, panel=GENERATION)
    top_p: float = same_option(Sampling, "top_p")


@command
def clamp(settings: ClampSettings) -> None:
    """Clamp neurons at a value and show the tokens whose probability changes.

    A value is a number, or a percentile of the neuron's activation weights over the texts of --data.
    """
    from braces_cli.inspection.clamp import parse_clamp

    clamps = [parse_clamp(text) for text in settings.clamps]
    if bool(settings.data) != any(clamp.percentile is not None for clamp in clamps):
        hint = "Write LAYER:INDEX=p99.9 and --data FILE, or neither."
        raise ConfigError("percentiles and --data need each other", where="--data", hint=hint)
    with progress(settings.quiet) as report:
        result = _clamp(settings, clamps, report)
    if settings.json:
        print_json(result)
        return
    if settings.data:
        rows = [(f"{c['layer']}:{c['index']}", c.get("percentile"), c["value"]) for c in result["clamps"]]
        print_table("", ["neuron", "percentile", "value"], rows)
    for row in result["prompts"]:
        title = f"{row['prompt']!r}: KL {row['kl']:.3g} nats after the prompt, {row['kl_mean']:.3g} over all positions"
        title += f"; rounding alone: {row['kl_noise']:.1g}"
        table = [(repr(t["token"])[1:-1], t["before"], t["after"], t["ratio"]) for t in row["tokens"]]
        print_table(title, ["token", "before", "after", "ratio"], table)
        if "text" in row:
            print_table("", ["clamp", "continuation"], [("before", row["text_before"]), ("after", row["text"])])


def _clamp(settings: ClampSettings, clamps: "list[Clamp]", report: Any) -> dict[str, Any]:
    from braces_cli.core.models.generate import TextRequest
    from braces_cli.inspection.clamp import check_clamps, clamp_prompt, clamped, read_texts, resolve_percentiles
    from braces_cli.inspection.vocabulary import plain_ffns
    from braces_cli.steering.prompts import read_prompts
    from braces_cli.steering.texts import generate_texts

    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, None, settings.seed)
    prompts = list(read_prompts(settings.prompt, settings.prompts, sys.stdin))
    session, lens = _open(settings)
    ffns = plain_ffns(session.ffns)
    check_clamps(ffns, clamps)
    if settings.data:
        clamps = resolve_percentiles(session, clamps, read_texts(session, settings.data, settings.limit), report)
    tokens = [lens.vocabulary.single(text, "--token") for text in settings.token]
    rows = []
    for number, prompt in enumerate(prompts):
        report("clamping", number, len(prompts))
        row = clamp_prompt(session, lens, prompt, clamps, tokens=tokens, top_k=settings.top_k)
        if settings.generate:
            requests = [TextRequest(prompt, number)]
            (row["text_before"],) = generate_texts(session, requests, sampling)
            with clamped(ffns, clamps):
                (row["text"],) = generate_texts(session, requests, sampling)
        rows.append(row)
    shown = [{name: value for name, value in asdict(clamp).items() if value is not None} for clamp in clamps]
    return {"clamps": shown, "prompts": rows}


@dataclass(frozen=True, kw_only=True)
class ReportSettings(OverwriteSettings, AdapterSettings, DisplaySettings):
    """Settings of `braces inspect report`.

    Attributes:
        output: HTML file to write.
        prompt: Text for the heat map and the strongest vectors.
        target: Target token of the heat map. Default: the model's next token at each position.
    """

    first_options = ("output", "prompt", "model", "adapter", "target")

    output: Path = option()
    prompt: str = option("When I opened the door, I saw")
    target: str | None = option(None)


@command
def report(settings: ReportSettings) -> None:
    """Write a self-contained HTML page: gates, value vectors, a heat map of a prompt and attribute alignments."""
    from braces_cli.core.files import check_output_file, output_lock, write_text
    from braces_cli.inspection.report import render, report_data

    with output_lock(settings.output), progress(settings.quiet) as on_progress:
        check_output_file(settings.output, settings.overwrite)
        session, lens = _open(settings)
        target = None if settings.target is None else lens.vocabulary.single(settings.target, "--target")
        write_text(settings.output, render(report_data(session, lens, settings.prompt, target, on_progress)))
        written = {
            "output": str(settings.output),
            "model": session.base.name,
            "adapter": None if session.folder is None else str(session.folder),
            "bytes": settings.output.stat().st_size,
        }
    print_result(settings.json, "", written)


app = typer.Typer(help="Inspect a model and its adapter.", invoke_without_command=True)


@dataclass(frozen=True, kw_only=True)
class SummarySettings(DisplaySettings):
    """Settings of `braces inspect` without a subcommand, which loads no weights."""

    first_options = ("model", "adapter")

    model: str | None = same_option(AdapterSettings, "model")
    adapter: str | None = same_option(AdapterSettings, "adapter")
    revision: str | None = same_option(AdapterSettings, "revision")
    trust_remote_code: bool = same_option(AdapterSettings, "trust_remote_code")
    allow_other_base: bool = same_option(AdapterSettings, "allow_other_base")


@command
def summary(settings: SummarySettings) -> None:
    """Inspect a model and its adapter. Without a subcommand: gates and projections of each layer."""
    from braces_cli.core.adapter.model import open_shape
    from braces_cli.inspection.summary import summarise

    found = summarise(*open_shape(settings))
    if settings.json:
        print_json(found)
        return
    title = [f"{found['model']}, {found['base_parameters']:,} parameters"]
    if settings.adapter:
        relevance = f"relevance to the {found['relevance_to']}"
        title.append(f"adapter {settings.adapter}, {found['parameters']:,} parameters, {relevance}")
    columns = [name.replace("_", " ") for name in found["layers"][0]]
    print_table(title, columns, [list(layer.values()) for layer in found["layers"]])


@app.callback()
@functools.wraps(summary)
def summary_or_subcommand(ctx: typer.Context, **values: Any) -> None:
    """Print the summary, unless there is a subcommand."""
    if ctx.invoked_subcommand is None:
        summary(ctx=ctx, **values)
    elif values["model"] or values["adapter"]:
        hint = f"Write braces inspect {ctx.invoked_subcommand} --model ... --adapter ..."
        raise ConfigError("options before the subcommand", where=f"inspect {ctx.invoked_subcommand}", hint=hint)


app.command("values")(values)
app.command("find")(find)
app.command("trace")(trace)
app.command("clamp")(clamp)
app.command("report")(report)
