"""Scorers: texts -> how much of a label each has, and whether it has it. One registry for all of them.

    vader              sentiment by VADER's lexicon and rules: positive, negative
    toxicity           toxicity by a word list that comes with braces: toxic
    FOLDER             a Hugging Face classifier on disk
    ORG/NAME           a Hugging Face text classifier
    judge:MODEL        a causal language model that rates texts, folder or hub id

A scorer that cannot score fails; nothing is ever scored zero because something went wrong.
"""

from __future__ import annotations

from collections.abc import Collection

from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.files import path_exists, user_path
from braces_cli.scoring.scorers import Scorer

# What an attribute is scored by where no scorer is named: scorer and label.
DEFAULTS = {
    "positive": ("vader", "positive"),
    "joyful": ("vader", "positive"),
    "negative": ("vader", "negative"),
    "sad": ("vader", "negative"),
    "toxic": ("toxicity", "toxic"),
}
BUILT_IN = ("vader", "toxicity")


def scorer(name: str, *, exclude: Collection[str] = (), device: str = "cpu") -> Scorer:
    """The scorer of that name.

    Args:
        name: see the top of this module.
        exclude: words that a lexicon or a fitted classifier must not look at, so that steering by a word list is not
            graded by the same list.
        device: of a Hugging Face classifier.

    Raises:
        ConfigError: unknown, not installed, or one that cannot leave words out.
        ModelError: a folder or hub id that cannot be loaded.
    """
    if name == "vader":
        from braces_cli.scoring.scorers import Vader

        return Vader(exclude)
    if name == "toxicity":
        from braces_cli.scoring.scorers import ToxicWords

        return ToxicWords(exclude)
    if name.startswith("judge:"):
        if exclude:
            raise _reads_whole_texts("judge model")
        from braces_cli.scoring.model_scorers import load_judge

        return load_judge(name)
    if not path_exists(user_path(name)) and name.count("/") != 1:
        known = f"There are {', '.join(BUILT_IN)}, judge:MODEL, folders and hub ids."
        hint = f"{near_misses(name, BUILT_IN)} {known}".strip()
        raise ConfigError(f"no scorer `{name}`", where="--scorer", hint=hint)
    if exclude:
        raise _reads_whole_texts("classifier")
    from braces_cli.scoring.model_scorers import load_hub_classifier

    return load_hub_classifier(name, device)


def _reads_whole_texts(kind: str) -> ConfigError:
    hint = "Words can be left out by vader, toxicity and fitted classifiers."
    return ConfigError(f"this {kind} reads whole texts", where="--exclude-list-words", hint=hint)


def default_scorer(attribute: str) -> str:
    """Name of the scorer for an attribute.

    Raises:
        ConfigError: none is known.
    """
    if attribute not in DEFAULTS:
        hint = f"Name one with --scorer. By themselves go {', '.join(DEFAULTS)}."
        raise ConfigError(f"nothing here tells whether a text is `{attribute}`", where="--scorer", hint=hint)
    return DEFAULTS[attribute][0]


def label_of(attribute: str, scorer: Scorer, requested_label: str | None = None) -> str:
    """The scorer's label that stands for the attribute: `requested_label`, its own name, or what it usually means.

    A scorer without labels, a judge model, is asked by that name whatever it is.

    Raises:
        ConfigError: the scorer has none of them.
    """
    if not scorer.labels:
        return requested_label or attribute
    names = {label.lower(): label for label in scorer.labels}
    usual = DEFAULTS.get(attribute, ("", attribute))[1]
    for label in [requested_label] if requested_label is not None else [attribute, usual]:
        if label.lower() in names:
            return names[label.lower()]
    hint = f"It has {', '.join(scorer.labels)}; name one with --score-label."
    raise ConfigError(f"{scorer.name} has no label `{requested_label or attribute}`", where="--scorer", hint=hint)
