"""Options of `braces eval` for tasks that write texts."""

from typing import Any

import typer

from braces_cli.core.utils.errors import ConfigError


def generation(ctx: typer.Context) -> Any:
    """The `Generation` among the command's parameters.

    Raises:
        ConfigError: strengths that do not fit the attributes, a `--scorer` that is not TASK=SCORER, or a bad range.
    """
    from braces_cli.core.attributes.word_lists import check_name
    from braces_cli.core.models.generation import Sampling
    from braces_cli.evaluation.native_task import Generation
    from braces_cli.evaluation.native_tasks import SENTIMENT, TOXICITY

    p = ctx.params
    names, strengths = [check_name(name) for name in p["attribute"] or ()], list(p["s"] or ())
    if len(set(names)) < len(names):
        raise ConfigError("an attribute is named twice", where="--attribute", hint="Give each once, with one --s.")
    if len(strengths) not in (0, len(names)):
        hint = "The k-th --s belongs to the k-th --attribute; give one for each, or none at all."
        raise ConfigError(f"{len(strengths)} strengths for {len(names)} attributes", where="--s", hint=hint)
    if p["attributes"] is not None and not p["attributes"].is_dir():
        raise ConfigError("no such folder", where=str(p["attributes"]), hint="Give the folder that attr-build wrote.")
    scorers = {}
    for value in p["scorer"] or ():
        task, sign, name = value.partition("=")
        if not (sign and name) or task not in (SENTIMENT.name, TOXICITY.name):
            hint = f"Such as --scorer {SENTIMENT.name}=vader or --scorer {TOXICITY.name}=FOLDER."
            raise ConfigError(f"`{value}` is not TASK=SCORER", where="--scorer", hint=hint)
        scorers[task] = name
    Sampling(p["max_new_tokens"], p["temperature"], p["top_p"])
    return Generation(
        dict(zip(names, strengths or [1.0] * len(names), strict=True)),
        p["attributes"],
        scorers,
        p["num_samples"],
        p["max_new_tokens"],
        p["temperature"],
        p["top_p"],
        p["judge_model"],
        p["exclude_list_words"],
    )
