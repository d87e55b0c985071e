"""`braces steer`: generate text, with or without an adapter, steered by attributes."""

from __future__ import annotations

from braces_cli.cli.command import command
from braces_cli.cli.console import set_up
from braces_cli.cli.dry_run import show_plan
from braces_cli.cli.steer_options import SteerSettings
from braces_cli.core.utils.distributed import is_main, world_size
from braces_cli.core.utils.errors import ConfigError


@command
def steer(settings: SteerSettings) -> None:
    """Generate text from prompts, steered along attributes by strength s (negative: away from them)."""
    settings.check()
    _ = settings.strengths  # refuses strengths that do not fit the attributes
    set_up(settings.quiet or not is_main(), settings.debug)
    if settings.dry_run:
        show_plan(settings)
        return
    if settings.sweep is not None:
        from braces_cli.cli.steer_sweep import run_sweep
        from braces_cli.core.utils.output_lock import output_lock

        with output_lock(settings.plot):
            run_sweep(settings)
    elif settings.interactive:
        if world_size() > 1:
            hint = "Leave out torchrun or accelerate launch."
            raise ConfigError("a conversation is for one process", where="--interactive", hint=hint)
        from braces_cli.cli.steer_interactive import run_interactive

        run_interactive(settings)
    else:
        from braces_cli.cli.steer_texts import write_texts

        write_texts(settings)
