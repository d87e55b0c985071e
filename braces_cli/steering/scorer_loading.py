"""The scorer of a sweep or a task: one that is there, or one fitted from the user's own labelled rows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from braces_cli.core.attributes.attribute import Attribute, load_attributes
from braces_cli.core.attributes.listing import TRAINED_FILE
from braces_cli.core.attributes.word_lists import OPPOSITES, built_in
from braces_cli.core.session import Session
from braces_cli.core.utils.errors import DataError
from braces_cli.core.utils.paths import path_exists
from braces_cli.data.readers import read_rows
from braces_cli.scoring.registry import scorer
from braces_cli.scoring.scorer import Scorer
from braces_cli.scoring.tfidf_classifier import Classifier, fit_classifier

logger = logging.getLogger("braces")

FIT = "fit:"
# The column of labels, the first of these that a row has.
LABEL_FIELDS = ("attribute", "label")


def open_scorer(name: str, *, exclude: Collection[str] = (), device: str = "cpu") -> Scorer:
    """The scorer called `name`; `fit:ROWS` fits a classifier from labelled rows (a file or a hub set).

    Args:
        exclude: words that it must not look at.

    Raises:
        ConfigError: unknown, not installed, or cannot leave words out.
        DataError: rows that cannot be read, or without text or label.
        ModelError: a classifier that cannot be loaded.
    """
    if not name.startswith(FIT):
        return scorer(name, exclude=exclude, device=device)
    rows = name.removeprefix(FIT)
    texts, labels = read_labelled(rows)
    try:
        fitted = fit_classifier(texts, labels, exclude)
    except DataError as error:
        raise DataError(error.message, where=rows, hint=error.hint) from error
    fitted.name = name
    _log_accuracy(fitted)
    return fitted


def read_labelled(name: str) -> tuple[list[str], list[str]]:
    """Texts and labels of rows with `text` and `attribute` or `label`.

    Raises:
        DataError: as `read_rows`, or a row without one of them.
    """
    texts, labels = [], []
    for row in read_rows(name):
        text = row.fields.get("text")
        label = next((row.fields[field] for field in LABEL_FIELDS if row.fields.get(field) is not None), None)
        if not isinstance(text, str) or not isinstance(label, (str, int)):
            hint = f"A labelled row holds `text` and `{'` or `'.join(LABEL_FIELDS)}`; found: {', '.join(row.fields)}."
            raise DataError("no text, or no label", where=row.where, hint=hint)
        texts.append(text)
        labels.append(str(label))
    return texts, labels


def list_words(session: Session, attributes: Sequence[Attribute], *, trained: bool = True) -> set[str]:
    """Words of the attributes, of their opposites, and where `trained`, of all that the adapter was trained with."""
    words = {word for attribute in attributes for word in attribute.words}
    lists = built_in()
    for attribute in attributes:
        words |= set(lists.get(OPPOSITES.get(attribute.name, ""), ()))
    if trained and session.folder is not None and path_exists(session.folder / TRAINED_FILE):
        trained_with = load_attributes(session.folder / TRAINED_FILE, session)
        words |= {word for attribute in trained_with.values() for word in attribute.words}
    return words


def _log_accuracy(fitted: Classifier) -> None:
    accuracy = fitted.measured["accuracy"]
    if accuracy is not None:
        majority = fitted.measured["majority"]
        logger.info(
            "%s: %.1f %% right on rows held out, %.1f %% by guessing", fitted.name, 100 * accuracy, 100 * majority
        )
