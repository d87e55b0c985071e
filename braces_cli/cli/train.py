"""`braces train`: fine-tune an adapter."""

from pathlib import Path
from typing import Annotated, Any

import typer

from braces_cli.cli import data_options as d
from braces_cli.cli import method_options as m
from braces_cli.cli import options as o
from braces_cli.cli.command import command_line
from braces_cli.cli.console import print_json, print_pairs, progress, set_up
from braces_cli.core.utils.errors import BracesError, ConfigError

_OWN = (
    "rank", "lr", "gate_lr", "epochs", "max_steps", "batch_size", "gradient_accumulation", "warmup_steps", "schedule",
    "max_length", "gradient_checkpointing", "seed", "attribute_field", "strength_field", "contrast", "margin", "method",
    "init", "scale", "relevance", "lora_alpha", "packing", "streaming",
)  # fmt: skip


def train(
    ctx: typer.Context,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Training rows: file or hub set (id:subset:split). Repeatable.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", help="Folder for the adapter.")] = None,
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval-data", help="Rows to measure base and adapter on. Repeatable.")
    ] = None,
    columns: d.Columns = None,
    streaming: d.Streaming = False,
    packing: d.PackingOption = d.Packing.auto,
    model: o.Model = None,
    method: m.Method = "braces",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the relevance projection.")] = 16,
    layers: o.Layers = None,
    lr: m.LearningRate = None,
    gate_lr: m.GateLearningRate = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Optimizer steps; beats --epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples a process and step.")] = 16,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", min=1, help="Batches an optimizer step.")
    ] = 1,
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", min=0, help="Steps until the peak rate.")] = 20,
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine or constant.")] = "linear",
    max_length: Annotated[
        int, typer.Option("--max-length", min=2, help="Tokens kept of an example (at most the model's context).")
    ] = 1024,
    attribute_field: Annotated[
        str | None, typer.Option("--attribute-field", help="Column of each row's attribute: train to be steered by it.")
    ] = None,
    strength_field: Annotated[
        str, typer.Option("--strength-field", help="Column of the attribute's strength; 1 where a row has none.")
    ] = "strength",
    opposites: Annotated[
        list[str] | None, typer.Option("--opposites", help="A:B, two attributes as the ends of one axis. Repeatable.")
    ] = None,
    contrast: m.Contrast = None,
    margin: m.Margin = None,
    attributes: Annotated[Path | None, typer.Option("--attributes", help="Folder that attr-build wrote.")] = None,
    init: m.Init = "random",
    scale: m.Scale = "paper",
    relevance: m.Relevance = "paper",
    lora_alpha: m.LoraAlpha = None,
    lora_targets: m.LoraTargets = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for about a third more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option("--save-steps", min=0, help="Steps between checkpoints; 0: none.")] = 500,
    save_total_limit: Annotated[
        int, typer.Option("--save-total-limit", min=0, help="Checkpoints that are kept; 0: all.")
    ] = 2,
    eval_steps: Annotated[
        int, typer.Option("--eval-steps", min=0, help="Steps between measurements on --eval-data; 0: at the end.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output-dir, if there is one.")
    ] = False,
    logging_steps: Annotated[int, typer.Option("--logging-steps", min=1, help="Steps between rows of metrics.")] = 10,
    report_to: Annotated[str, typer.Option("--report-to", help="tensorboard, wandb or none.")] = "none",
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Repository (owner/name) to upload the adapter to.")
    ] = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.DtypeOption = o.Dtype.auto,
    device_map: o.DeviceMap = None,
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    check: d.Check = False,
    fmt: o.FormatOption = o.Format.table,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fine-tune an adapter, or a baseline of peft, on texts, prompts and completions, instructions or chats."""
    from braces_cli.core.utils.distributed import is_main

    set_up(quiet or not is_main(), debug)
    from braces_cli.training.settings import TrainSettings, Upkeep

    m.settle(ctx)
    settled = d.settle_columns(ctx)
    own = {name: ctx.params[name] for name in _OWN}
    own |= {"opposites": _opposites(opposites, own["attribute_field"]), "packing": packing.value}
    own["lora_targets"] = m.names(lora_targets)
    upkeep = Upkeep(**{field: ctx.params[field] for field in Upkeep.__dataclass_fields__})
    if check:
        _check(ctx, own, settled, quiet)
        return
    if dry_run:
        TrainSettings(**own)
        _show(fmt, "dry run", _dry_run(ctx, own))
        return
    for name, value in (("--data", data), ("--output-dir", output_dir)):
        if not value:
            raise ConfigError("missing option", where=name, hint="See `braces train --help`.")
    assert data is not None
    assert output_dir is not None
    TrainSettings(**own)
    identity, result = _look_before(ctx, output_dir, upkeep)
    if result is None:
        with progress(quiet or not is_main()) as report:
            result = _run(ctx, own, settled, data, eval_data, output_dir, report, upkeep, identity)
    if is_main():
        if push_to_hub is not None:
            from braces_cli.training.hub_upload import push

            push(output_dir, push_to_hub)
        _show(fmt, f"adapter written to {output_dir}", result)


def _look_before(ctx: typer.Context, folder: Path, upkeep: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the run is known by, and its result if it has finished already; refuses what could not end well."""
    from braces_cli.core.utils.atomic_files import check_output_folder
    from braces_cli.core.utils.distributed import is_main
    from braces_cli.training.checkpointing.run_record import finished, identity
    from braces_cli.training.launcher_checks import check_launch

    check_launch(upkeep.resume, ctx.params["attribute_field"] is not None, ctx.params["device"])
    known = identity(o.resolved(ctx))
    if upkeep.resume and ctx.params["overwrite"]:
        raise ConfigError("--resume keeps what --overwrite removes", where="--resume", hint="Give one of the two.")
    # One process looks: by the time that another one does, the first may be writing.
    if is_main() or upkeep.resume:
        check_output_folder(folder, ctx.params["overwrite"] or upkeep.resume)
    if upkeep.push_to_hub is not None:
        from braces_cli.training.hub_upload import check_push

        check_push(upkeep.push_to_hub)
    return known, finished(folder, known) if upkeep.resume else None


def _run(
    ctx: typer.Context,
    own: dict[str, Any],
    columns: Any,
    data: list[str],
    eval_data: list[str] | None,
    folder: Path,
    report: Any,
    upkeep: Any,
    identity: dict[str, Any],
) -> dict[str, Any]:
    from dataclasses import asdict, replace

    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.models.loading import load_shape
    from braces_cli.core.session import base_name, open_session
    from braces_cli.data.examples import read_examples
    from braces_cli.data.streaming_examples import Stream
    from braces_cli.training.checkpointing.run_record import Record
    from braces_cli.training.sampler import global_batch
    from braces_cli.training.settings import TrainSettings
    from braces_cli.training.train import count_parameters, run_training

    params = ctx.params
    # What can be wrong is looked at before minutes of loading weights: rank and layers on the bare shape, then rows.
    code = params["trust_remote_code"]
    name = base_name(params["model"], None)
    shape = load_shape(name, revision=params["revision"], trust_remote_code=code)
    settings = TrainSettings(**own, layers=chosen_layers(shape, params["layers"]))
    count_parameters(shape, settings)
    how = _reading(ctx, name, shape, columns)
    settings = replace(settings, max_length=how.max_length)
    train_set: Any
    if settings.streaming:
        train_set = Stream(data, how, settings.seed, global_batch(settings))
    else:
        train_set = read_examples(data, how, report)
    eval_set = read_examples(eval_data, how, report) if eval_data else None
    settings = replace(settings, chat_template=train_set.chat)
    session = open_session(name, None, o.load_options(ctx))
    record = Record(identity, command_line())
    result = run_training(session, train_set, eval_set, settings, folder, report, params["attributes"], upkeep, record)
    return asdict(result)


def _reading(ctx: typer.Context, name: str, shape: Any, columns: Any) -> Any:
    """How this call's rows become examples; needs the tokenizer, no weights."""
    from braces_cli.core.models.loading import load_tokenizer
    from braces_cli.core.models.tokenization import context_length
    from braces_cli.data.examples import Fields, Reading

    params = ctx.params
    code = params["trust_remote_code"]
    tokenizer = load_tokenizer(name, revision=params["revision"], trust_remote_code=code)
    attribute = params["attribute_field"]
    fields = None if attribute is None else Fields(attribute, params["strength_field"])
    length = min(params["max_length"], context_length(shape, tokenizer))
    return Reading(tokenizer, length, fields, columns, params["streaming"])


def _check(ctx: typer.Context, own: dict[str, Any], columns: Any, quiet: bool) -> None:
    from braces_cli.core.models.loading import load_shape
    from braces_cli.core.session import base_name
    from braces_cli.data.dataset_report import check_rows
    from braces_cli.training.settings import TrainSettings

    params = ctx.params
    if not params["data"]:
        raise ConfigError("missing option", where="--data", hint="See `braces train --help`.")
    TrainSettings(**own)
    name, code = base_name(params["model"], None), params["trust_remote_code"]
    shape = load_shape(name, revision=params["revision"], trust_remote_code=code)
    how = _reading(ctx, name, shape, columns)
    with progress(quiet) as report:
        sets = {name: params[name] for name in ("data", "eval_data")}
        found = {name: check_rows(files, how, report) if files else None for name, files in sets.items()}
    d.show_check(params["fmt"] is o.Format.json, found)


def _opposites(values: list[str] | None, attribute_field: str | None) -> Any:
    from braces_cli.training.attribute_conditioning import parse_opposites

    if values and attribute_field is None:
        hint = "Name the column of each row's attribute with --attribute-field."
        raise ConfigError("no attributes are trained", where="--opposites", hint=hint)
    return parse_opposites(values or ())


def _dry_run(ctx: typer.Context, own: dict[str, Any]) -> dict[str, Any]:
    """Settings and parameter count; where the model cannot be reached, why not."""
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.models.loading import load_shape
    from braces_cli.core.session import base_name
    from braces_cli.training.settings import TrainSettings
    from braces_cli.training.train import count_parameters

    params = ctx.params
    out: dict[str, Any] = {"output_dir": params["output_dir"] and str(params["output_dir"]), "method": own["method"]}
    resolved = o.resolved(ctx)
    try:
        name = base_name(params["model"], None)
        shape = load_shape(name, revision=params["revision"], trust_remote_code=params["trust_remote_code"])
        layers = chosen_layers(shape, params["layers"])
        settings = TrainSettings(**own, layers=layers).at_width(find_ffns(shape)[0].hidden_size)
        out.update(count_parameters(shape, settings))
        resolved |= {name: getattr(settings, name) for name in ("lr", "gate_lr", "contrast")}
    except ConfigError:
        # A rank or a layer that does not fit is a mistake to mend, not a model out of reach.
        raise
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    return {**out, "settings": resolved}


def _show(fmt: o.Format, title: str, result: dict[str, Any]) -> None:
    if fmt is o.Format.json:
        print_json(result)
    else:
        flat = {**result, **result.get("settings", {})}
        flat.pop("settings", None)
        print_pairs(title, flat)
