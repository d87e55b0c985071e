"""`braces train`: fine-tune an adapter."""

from dataclasses import dataclass
from typing import Any

from braces_cli.cli.command import command, command_line
from braces_cli.cli.console import print_json, print_pairs, progress, set_up
from braces_cli.cli.options import OutputSettings
from braces_cli.core.utils.errors import BracesError, ConfigError
from braces_cli.core.utils.settings import DATA, option
from braces_cli.training.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class TrainCommandSettings(RunSettings, OutputSettings):
    """Settings of `braces train`."""

    check: bool = option(
        False,
        help="Read and tokenise all rows, show what is found, and stop. Needs no weights.",
        panel=DATA,
        outcome=False,
    )


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
        _show(settings, "dry run", _planned(settings))
        return
    from braces_cli.training.hub_upload import push
    from braces_cli.training.train import train as run

    with progress(quiet) as report:
        result = run(settings, report, command_line())
    if is_main():
        if settings.push_to_hub is not None and settings.output_dir is not None:
            push(settings.output_dir, settings.push_to_hub)
        _show(settings, f"adapter written to {settings.output_dir}", result)


def _planned(settings: TrainCommandSettings) -> dict[str, Any]:
    """Settings and parameter count; where the model cannot be reached, why not."""
    from braces_cli.core.models.ffn import find_ffns
    from braces_cli.training.train import count_parameters, load_base_shape

    out: dict[str, Any] = {"output_dir": settings.output_dir and str(settings.output_dir), "method": settings.method}
    try:
        _, shape = load_base_shape(settings)
        out.update(count_parameters(shape, settings))
        settings = settings.at_width(find_ffns(shape)[0].hidden_size)
    except ConfigError:
        # A rank or a layer that does not fit is a mistake to mend, not a model out of reach.
        raise
    except BracesError as error:
        out.update({"trainable_parameters": None, "reason": str(error).replace("\n", " ")})
    return {**out, "settings": settings.resolved()}


def _show(settings: TrainCommandSettings, title: str, result: dict[str, Any]) -> None:
    if settings.json:
        print_json(result)
    else:
        flat = {**result, **result.get("settings", {})}
        flat.pop("settings", None)
        print_pairs(title, flat)
