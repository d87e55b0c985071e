"""`braces recipe`: the training recipes that ship with braces, listed and copied."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import typer

from braces_cli.cli.options import command
from braces_cli.cli.output import print_json, print_result, print_table
from braces_cli.core.config import option
from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.options import DisplaySettings, OverwriteSettings

app = typer.Typer(help="List and copy the training recipes that ship with braces.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class CopySettings(OverwriteSettings, DisplaySettings):
    """Settings of `braces recipe copy`.

    Attributes:
        name: Name of the recipe, as `braces recipe list` shows it.
        output_dir: Folder to copy the recipe into.
    """

    name: str = option(argument=True)
    output_dir: Path = option(Path("."))


@command
def list_recipes(settings: DisplaySettings) -> None:
    """List the training recipes by name."""
    # The first comment is the title.
    described = {name: text.partition("\n")[0].strip("# .") for name, text in recipes().items()}
    if settings.json:
        print_json([{"name": name, "description": title} for name, title in described.items()])
        return
    print_table("", ["recipe", "what it trains"], described.items())


@command
def copy_recipe(settings: CopySettings) -> None:
    """Copy a training recipe, to be edited and given to `braces train --config`."""
    from braces_cli.core.files import check_output_file, output_lock, write_text

    known = recipes()
    name = settings.name.removesuffix(".yaml")
    if name not in known:
        hint = near_misses(name, known) or "`braces recipe list` shows all names."
        raise ConfigError(f"no recipe `{settings.name}`", where="recipe copy", hint=hint)
    output = settings.output_dir / f"{name}.yaml"
    with output_lock(output):
        check_output_file(output, settings.overwrite)
        write_text(output, known[name])
    print_result(settings.json, "", {"recipe": name, "output": str(output)})


def recipes() -> dict[str, str]:
    """Return the YAML text of each recipe by name, in alphabetical order."""
    files = (resources.files("braces_cli.assets") / "recipes").iterdir()
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")}
    return {name.removesuffix(".yaml"): texts[name] for name in sorted(texts)}


app.command("list")(list_recipes)
app.command("copy")(copy_recipe)
