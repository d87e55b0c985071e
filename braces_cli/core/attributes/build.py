"""Two descriptions -> pairs of passages: the same beginnings of sentences behind prompts that hold one or the other.

What is pooled over are the beginnings alone. They are the same on both sides, so what differs in their states is what
the description in front has made of them.

Contrasting pairs -> an attribute, with the layers that it pushes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.directions import (
    Item,
    Pair,
    Passage,
    default_reduction,
    description_items,
    pair_states,
    reduce_pairs,
    separation,
    text_items,
)
from braces_cli.core.attributes.pooling import default_layers, output_norms, steering_scale
from braces_cli.core.attributes.vector import Attribute, check_numbers, with_gradient_direction, with_steered_layers
from braces_cli.core.attributes.words import GRADIENT
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.tokenize import has_template
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.progress import Report, silent

# `{}` is the description: of somebody, or of a text.
PLAIN_TEMPLATES = (
    "Imagine {}.",
    "This is {}.",
    "It makes you think of {}.",
    "What follows comes from {}.",
    "Here we have {}:",
    "Once more, {}.",
)
# For models with a chat template: what the user says.
CHAT_TEMPLATES = (
    "Write a few sentences in the way of {}.",
    "Imagine {}. Then say something.",
    "Say something that makes me think of {}.",
    "Show me {} in a few words.",
    "Let your answer come from {}.",
    "Here is what I want to read: {}.",
)
# The same request without any description.
CHAT_WITHOUT_DESCRIPTION = "Write a few sentences."


def stems() -> list[str]:
    """Beginnings of sentences that come with braces, of no mood or topic."""
    file = resources.files("braces_cli.assets") / "prompts" / "stems.txt"
    return file.read_text(encoding="utf-8").splitlines()


def check_descriptions(describe: Sequence[str], against: Sequence[str]) -> None:
    """Refuse descriptions that do not go together.

    Raises:
        ConfigError: none, a blank one, or not as many on either side.
    """
    where = "--describe, --against"
    if len(describe) != len(against) or not describe:
        hint = 'Such as --describe "a cheerful person" --against "a gloomy person".'
        what = f"{len(describe)} descriptions against {len(against)}"
        raise ConfigError(what, where=where, hint=hint)
    if not all(text.strip() for text in (*describe, *against)):
        raise ConfigError("a description is blank", where=where, hint="Describe somebody, or a text.")


def description_pairs(describe: Sequence[str], against: Sequence[str], chat: bool = False) -> list[Pair]:
    """A pair for each stem, template and pair of descriptions.

    Args:
        describe: descriptions of the positive side; the k-th belongs to the k-th of `against`.
        chat: the templates of a chat, through the tokenizer's chat template.

    Raises:
        ConfigError: as `check_descriptions`.
    """
    check_descriptions(describe, against)
    templates = CHAT_TEMPLATES if chat else PLAIN_TEMPLATES

    def passage(stem: str, template: str, description: str) -> Passage:
        # In a chat the answer begins with the text; behind a plain prompt a space sets it off.
        return Passage(stem if chat else f" {stem}", template.format(description.strip()), chat)

    # Stems outermost: every other pair, which is how pairs are halved, then has every stem with half of the templates.
    return [
        Pair(passage(stem, template, one), passage(stem, template, other))
        for stem in stems()
        for template in templates
        for one, other in zip(describe, against, strict=True)
    ]


# Pairs that both halves of a held-out measurement need.
_FEWEST = 4


@dataclass(frozen=True)
class PairReading:
    """How pairs become an attribute.

    Attributes:
        reduction: one of `word_lists.REDUCTIONS`, or `word_lists.GRADIENT`; None is the latter, where the model lets
            gradients through.
        pooling: over the tokens of each text, one of `word_lists.POOLINGS`.
        layers: decoder layers that are pushed without training; "auto" chooses those that separate held-out pairs best,
            None means the default ones.
        chat: prompts are a user's turns of a chat; None means where the tokenizer has a chat template.
    """

    reduction: str | None = None
    pooling: str = "mean"
    layers: Sequence[int] | str | None = None
    chat: bool | None = None


def attribute_from_descriptions(
    session: Session,
    name: str,
    describe: Sequence[str],
    against: Sequence[str],
    reading: PairReading | None = None,
    report: Report = silent,
) -> Attribute:
    """An attribute of what descriptions in front of the same texts make of them.

    Args:
        describe: of the positive side; the k-th belongs to the k-th of `against`.

    Raises:
        ConfigError: not as many descriptions on either side, or a chat without a template.
    """
    reading = reading or PairReading()
    pairs = description_pairs(describe, against, _chat(session, reading.chat))
    attribute = _from_pairs(session, name, pairs, reading, report)
    return replace(attribute, provenance={**attribute.provenance, "describe": list(describe), "against": list(against)})


def attribute_from_pairs(
    session: Session, name: str, pairs: Sequence[Pair], reading: PairReading | None = None, report: Report = silent
) -> Attribute:
    """An attribute from pairs of texts, or of prompts and completions; only texts and completions are pooled over.

    Raises:
        ConfigError: a chat without a template.
        DataError: no pair, or too few to choose layers by.
    """
    reading = reading or PairReading()
    chat = _chat(session, reading.chat)
    sides = [(_in_chat(pair.positive, chat), _in_chat(pair.negative, chat)) for pair in pairs]
    return _from_pairs(session, name, [Pair(*both) for both in sides], reading, report)


def _chat(session: Session, requested: bool | None) -> bool:
    """Whether prompts go through the chat template."""
    there = has_template(session.base.tokenizer)
    if requested and not there:
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return there if requested is None else requested


def _in_chat(passage: Passage, chat: bool) -> Passage:
    """A text without a prompt answers nothing, so it stays outside of any chat."""
    return replace(passage, chat=chat and bool(passage.prompt))


def _from_pairs(session: Session, name: str, pairs: Sequence[Pair], reading: PairReading, report: Report) -> Attribute:
    states = pair_states(session, pairs, pooling=reading.pooling, report=report)
    # Where the push goes another way, the state is still the difference of means.
    requested = reading.reduction or default_reduction(session)
    by_gradient, reduction = requested == GRADIENT, "mean" if requested == GRADIENT else requested
    direction, middle = reduce_pairs(states, reduction), states.middle
    layers = [ffn.layer for ffn in session.ffns]
    provenance: dict[str, Any] = {
        "pairs": len(pairs),
        "reduction": reduction,
        "chat_template": any(pair.positive.chat for pair in pairs),
    }
    if len(pairs) >= _FEWEST:
        provenance["separation"] = separation(states, reduction)
    residual = output_norms(session)
    attribute = Attribute(
        name,
        [],
        middle + direction,
        middle,
        residual,
        steering_scale(residual, direction, default_layers(layers)),
        layers,
        session.base.fingerprint,
        session.base.name,
        reading.pooling,
        2 * len(pairs),
        provenance=provenance,
    )
    check_numbers(attribute, name, OVERFLOW_HINT)
    attribute = with_steered_layers(attribute, _steered_layers(attribute, reading.layers))
    return with_gradient_direction(session, attribute, _items(session, pairs), report) if by_gradient else attribute


def _items(session: Session, pairs: Sequence[Pair]) -> list[Item]:
    """What should be likelier: the texts of one side, or, of texts that both sides share, what their prompts make of
    them.
    """
    shared = [pair for pair in pairs if pair.positive.text == pair.negative.text]
    others = [pair for pair in pairs if pair.positive.text != pair.negative.text]
    before = CHAT_WITHOUT_DESCRIPTION if any(pair.positive.chat for pair in shared) else ""
    items = description_items(session, shared, before)
    return items + text_items(session, [pair.positive for pair in others], [pair.negative for pair in others])


def _steered_layers(attribute: Attribute, requested: Sequence[int] | str | None) -> Sequence[int] | None:
    """The layers that are pushed without training; None means the default ones."""
    if not isinstance(requested, str):
        return requested
    if "separation" not in attribute.provenance:
        what = f"{attribute.provenance['pairs']} pairs are too few to choose layers by"
        raise DataError(what, where="--layers auto", hint="Give more pairs, or name the layers.")
    return best_layers(attribute.layers, [row["effect"] for row in attribute.provenance["separation"]])


def best_layers(layers: Sequence[int], effects: Sequence[float]) -> list[int]:
    """As many layers as are pushed by default, those that separate held-out pairs best, in order."""
    order = sorted(range(len(layers)), key=lambda row: (-effects[row], row))
    return sorted(layers[row] for row in order[: len(default_layers(layers))])
