"""`braces train`: fine-tune an adapter."""

from dataclasses import dataclass, replace
from typing import Any

from braces_cli.cli.command import command, command_line
from braces_cli.cli.console import file_size, print_json, print_pairs, progress, set_up
from braces_cli.cli.dry_run import show_plan
from braces_cli.cli.options import OutputSettings
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.settings import DATA, option
from braces_cli.training.defaults import capped_warmup
from braces_cli.training.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class TrainCommandSettings(RunSettings, OutputSettings):
    """Settings of `braces train`."""

    first_options = ("data", "model", "output_dir", "method", "attribute_field")

    check: bool = option(
        False,
        help="Read and tokenise all rows, print statistics and exit. Loads no weights.",
        panel=DATA,
        outcome=False,
    )


# What the table calls the fields of the result.
_LABELS = {
    "base_eval_loss": "evaluation loss of the base",
    "base_eval_perplexity": "evaluation perplexity of the base",
    "base_eval_perplexity_without_eos": "the same, end tokens not counted",
    "eval_loss": "evaluation loss of the adapter",
    "eval_perplexity": "evaluation perplexity of the adapter",
    "eval_perplexity_without_eos": "the same, end tokens not counted",
    "condition_parameters": "parameters of the attributes' MLP",
    "trainable_percent": "trainable parameters, percent",
    "side_path_share": "size of the adapter's output over that of the FFN, across layers",
    "padding_share": "share of computed tokens that is padding",
    "packed": "several examples a row",
    "rows_truncated": "rows cut to the maximum length",
    "rows_dropped": "rows without a token to score",
}


@command
def train(settings: TrainCommandSettings) -> None:
    """Fine-tune an adapter, or a baseline of peft, on texts, prompts and completions, instructions or chats."""
    from braces_cli.core.utils.distributed import is_main

    quiet = settings.quiet or not is_main()
    set_up(quiet, settings.debug)
    if settings.check:
        from braces_cli.cli.train_check import check

        check(settings)
        return
    if settings.dry_run:
        _plan(settings)
        return
    from braces_cli.core.models.hub_upload import ADAPTER_FILES, push
    from braces_cli.training.train import train as run

    with progress(quiet) as report:
        result = run(settings, report, command_line())
    if is_main():
        if settings.push_to_hub is not None and settings.output_dir is not None:
            again = "the same command with --resume tries the upload again"
            push(settings.output_dir, settings.push_to_hub, ADAPTER_FILES, again)
        _show(settings, f"adapter written to {settings.output_dir}", result)


def _plan(settings: TrainCommandSettings) -> None:
    """Print settings as they will take effect and the parameter count; where the model cannot be reached, why not."""
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.training.adapter_setup import for_base, starting_point
    from braces_cli.training.train import count_parameters, load_base_shape, row_reading

    out: dict[str, Any] = {"output_dir": settings.output_dir and str(settings.output_dir), "method": settings.method}
    try:
        settings, _ = starting_point(settings)
        name, shape = load_base_shape(settings)
        settings = for_base(settings, find_ffns(shape))
        out.update(count_parameters(shape, settings))
        settings = replace(settings, max_length=row_reading(settings, name, shape.config).max_length)
    except ConfigError:
        # A rank or a layer that does not fit is a mistake to mend, not a model out of reach.
        raise
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    if settings.max_steps is not None:
        settings = replace(settings, warmup_steps=capped_warmup(settings.warmup_steps, settings.max_steps))
    show_plan(settings, out, settings.unused())


def _show(settings: TrainCommandSettings, title: str, result: dict[str, Any]) -> None:
    if settings.json:
        print_json(result)
        return
    shares = result["side_path_share"]
    shown = {
        **result,
        "peak_memory": file_size(result["peak_memory"]),
        "side_path_share": shares and f"{min(shares):.1%} to {max(shares):.1%}",
        "padding_share": f"{result['padding_share']:.1%}",
    }
    print_pairs(title, shown, _LABELS)
