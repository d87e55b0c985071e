"""`braces train --check`: what the rows come to, without weights."""

from typing import Any

from braces_cli.cli.console import print_json, print_pairs, print_table, progress
from braces_cli.core.utils.errors import ConfigError


def check(settings: Any) -> None:
    """Read and tokenise all rows and print what was found.

    Raises:
        ConfigError: no rows are named.
        DataError: a row cannot be read.
    """
    from braces_cli.core.models.loading import load_config
    from braces_cli.core.session import base_name
    from braces_cli.data.dataset_report import check_rows
    from braces_cli.training.adapter_setup import starting_point
    from braces_cli.training.train import row_reading

    if not settings.data:
        raise ConfigError("missing option", where="--data", hint="See `braces train --help`.")
    settings, _ = starting_point(settings)
    name = base_name(settings.model, None)
    config = load_config(name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    reading = row_reading(settings, name, config)
    with progress(settings.quiet) as report:
        sets = {name: getattr(settings, name) for name in ("data", "eval_data")}
        found = {name: check_rows(files, reading, report) if files else None for name, files in sets.items()}
    _show(settings.json, found)


def _show(as_json: bool, sets: dict[str, Any]) -> None:
    """Print what `--check` found, by option name."""
    if as_json:
        print_json(sets)
        return
    for option, found in sets.items():
        if found is None:
            continue
        counts = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
        lengths = {f"length, {name}": value for name, value in found["lengths"].items()}
        print_pairs(option, {**counts, **lengths})
        most = max(bar["examples"] for bar in found["histogram"])
        bars = [
            [f"{bar['from']}-{bar['to']}", bar["examples"], "#" * -(-40 * bar["examples"] // most)]
            for bar in found["histogram"]
        ]
        print_table("tokens of an example", ["tokens", "examples", ""], bars)
        print_table("formats", ["", "rows"], found["formats"].items())
        if found["attributes"]:
            rows = [(name, count, *found["strengths"][name].values()) for name, count in found["attributes"].items()]
            print_table("attributes and their strengths", ["", "rows", "least", "mean", "most"], rows)
        if found["dropped_at"]:
            print_table("rows without a text to score", [""], [[where] for where in found["dropped_at"]])
        texts = [
            [shown["where"], "".join(f"[[{p['text']}]]" if p["scored"] else p["text"] for p in shown["parts"])]
            for shown in found["shown"]
        ]
        print_table("examples, double brackets around what is scored", ["row", "text"], texts)
