"""`braces steer`: generate text, with or without an adapter, pushed along attributes."""

from __future__ import annotations

from braces_cli.cli.command import command
from braces_cli.cli.console import print_json, set_up
from braces_cli.cli.dry_run import show_plan
from braces_cli.cli.steer_options import SteerSettings
from braces_cli.core.utils.distributed import is_main, world_size
from braces_cli.core.utils.errors import ConfigError


@command
def steer(settings: SteerSettings) -> None:
    """Generate text from prompts, steered along attributes by strength s (negative: away from them)."""
    settings.check()
    strengths = settings.strengths
    set_up(settings.quiet or not is_main(), settings.debug)
    if settings.dry_run:
        show_plan(settings)
        return
    if settings.sweep is not None:
        from braces_cli.cli.steer_sweep import run_sweep
        from braces_cli.core.utils.output_lock import output_lock

        with output_lock(settings.plot):
            run_sweep(settings)
    elif settings.export_control_vector is not None:
        if is_main():
            _export(settings, strengths)
    elif settings.interactive:
        if world_size() > 1:
            hint = "Leave out torchrun or accelerate launch."
            raise ConfigError("a conversation is for one process", where="--interactive", hint=hint)
        from braces_cli.cli.steer_interactive import converse

        converse(settings)
    else:
        from braces_cli.cli.steer_texts import write_texts

        write_texts(settings)


def _export(settings: SteerSettings, strengths: dict[str, float]) -> None:
    from braces_cli.core.attributes.lookup import find_attribute
    from braces_cli.core.models.layer_ranges import chosen_layers
    from braces_cli.core.session import open_session
    from braces_cli.core.utils.output_lock import output_lock
    from braces_cli.export.control_vector import check_export, export_control_vector

    path = settings.export_control_vector
    assert path is not None
    with output_lock(path):
        check_export(path, settings.overwrite)
        session = open_session(settings.model, settings.adapter, settings.load_options)
        terms = [(find_attribute(session, name, settings.attributes), s) for name, s in strengths.items()]
        layers = chosen_layers(session.base.model, settings.layers)
        print_json({**export_control_vector(session, terms, layers, path), "attributes": strengths})
