"""Build attributes of a base from words, texts, descriptions or pairs of texts; an attached adapter has no effect.

    source          p, at the FFN's input and at its output            reference
    words, texts    pooled(words) - pooled(reference)                  neutral words or texts, because the pooled states
                                                                       of all words share most of their direction
    opposite lists  (pooled(one) - pooled(other)) / 2                  the middle of the two lists
    pairs           from the middle of the two sides to the positive   the middle
                    one, by one of REDUCTIONS

Descriptions are pairs: the same beginnings of sentences, after prompts that contain one description or the other. The
direction of the steering vector is p, or the gradient of the attribute's log odds (`core.attributes.directions`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes import directions
from braces_cli.core.attributes.pooling import ffn_watches, output_norms, pool_texts, pool_words
from braces_cli.core.attributes.vector import Attribute, check_numbers, default_layers, with_steered_layers
from braces_cli.core.attributes.words import GRADIENT, OPPOSITES, REFERENCE, built_in, neutral_texts, stems, templates
from braces_cli.core.errors import ConfigError, DataError
from braces_cli.core.models.tokenize import has_template
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.progress import Report, silent

# A request of the chat templates without a description.
CHAT_WITHOUT_DESCRIPTION = "Write a few sentences."
# Both halves of a held-out measurement need two pairs.
_FEWEST = 4


def build_attribute(
    session: Session,
    name: str,
    words: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
    reduction: str | None = "mean",
    opposites: Sequence[str] | None = None,
) -> Attribute:
    """Build an attribute from words.

    Args:
        pooling: over the tokens of each word, one of `POOLINGS`.
        reduction: direction of the steering vector: "mean" is p; None is "gradient" unless the model is offloaded.
        opposites: words of the opposite attribute; None: the neutral list is the reference.

    Raises:
        ModelError: states that are not finite.
    """
    others = opposites or built_in()[REFERENCE]
    hidden, reference = (pool_words(session, each, report, pooling) for each in (words, others))
    reference = (hidden + reference) / 2 if opposites else reference
    items = partial(directions.word_items, session, words, others)
    return _attribute(session, name, hidden, reference, pooling, reduction, items, report, words=list(words))


def built_in_attribute(session: Session, name: str, report: Report = silent, **details: Any) -> Attribute:
    """Build the attribute of a built-in word list, against the opposite list if there is one; see `build_attribute`."""
    lists = built_in()
    return build_attribute(session, name, lists[name], report, opposites=lists.get(OPPOSITES.get(name, "")), **details)


def attribute_from_texts(
    session: Session,
    name: str,
    texts: Sequence[str],
    report: Report = silent,
    pooling: str = "mean",
    reduction: str | None = "mean",
) -> Attribute:
    """Build an attribute from texts, against the neutral texts; see `build_attribute`."""
    sides = (texts, neutral_texts())
    hidden, reference = (pool_texts(session, side, report, pooling) for side in sides)
    items = partial(directions.text_items, session, *([directions.Passage(text) for text in side] for side in sides))
    return _attribute(session, name, hidden, reference, pooling, reduction, items, report, examples=len(texts))


def attribute_from_descriptions(
    session: Session,
    name: str,
    describe: Sequence[str],
    against: Sequence[str],
    report: Report = silent,
    *,
    chat: bool | None = None,
    **details: Any,
) -> Attribute:
    """Build an attribute from descriptions of its two sides.

    Args:
        describe: descriptions of the positive side; the k-th belongs to the k-th of `against`.
        against: descriptions of the negative side.
        chat, details: see `attribute_from_pairs`.
    """
    pairs = description_pairs(describe, against, _uses_chat(session, chat))
    attribute = attribute_from_pairs(session, name, pairs, report, chat=chat, **details)
    return replace(attribute, provenance={**attribute.provenance, "describe": list(describe), "against": list(against)})


def attribute_from_pairs(
    session: Session,
    name: str,
    pairs: Sequence[directions.Pair],
    report: Report = silent,
    *,
    pooling: str = "mean",
    reduction: str | None = None,
    layers: Sequence[int] | str | None = None,
    chat: bool | None = None,
) -> Attribute:
    """Build an attribute from pairs of texts, or of prompts and completions; prompts are not pooled.

    Args:
        pooling: over the tokens of each text, one of `POOLINGS`.
        reduction: one of `REDUCTIONS`, or "gradient"; None is the latter unless the model is offloaded.
        layers: decoder layers of the steering vector; "auto" chooses those that separate held-out pairs best.
        chat: prompts are user turns; None: if the tokenizer has a chat template.

    Raises:
        ConfigError: `chat` without a chat template.
        DataError: too few pairs to choose layers.
    """
    use_chat = _uses_chat(session, chat)
    # Texts without a prompt are not answers, so the chat template does not apply to them.
    sides = [[replace(side, chat=use_chat and bool(side.prompt)) for side in (p.positive, p.negative)] for p in pairs]
    pairs = [directions.Pair(*both) for both in sides]
    states = directions.pair_states(session, pairs, ffn_watches(session.ffns), pooling=pooling, report=report)
    inputs = directions.PairStates(states.positive[: len(session.ffns)], states.negative[: len(session.ffns)])
    reduction = reduction or directions.default_reduction(session)
    # With the gradient as direction, p is the difference of means.
    reduced_by = "mean" if reduction == GRADIENT else reduction
    is_chat = any(pair.positive.chat for pair in pairs)
    provenance: dict[str, Any] = {"pairs": len(pairs), "reduction": reduced_by, "chat_template": is_chat}
    if len(pairs) >= _FEWEST:
        provenance["separation"] = directions.separation(inputs, reduced_by)
    if layers == "auto":
        if "separation" not in provenance:
            what = f"{len(pairs)} pairs are too few to choose layers"
            raise DataError(what, where="--layers auto", hint="Give more pairs, or name the layers.")
        effects = [row["effect"] for row in provenance["separation"]]
        layers = best_layers([ffn.layer for ffn in session.ffns], effects)
    assert not isinstance(layers, str)

    def items() -> list[directions.Item]:
        # Evidence: the texts of a side, or, for texts that both sides share, the effect of their prompts.
        shared = [pair for pair in pairs if pair.positive.text == pair.negative.text]
        others = [pair for pair in pairs if pair.positive.text != pair.negative.text]
        before = CHAT_WITHOUT_DESCRIPTION if any(pair.positive.chat for pair in shared) else ""
        texts = directions.text_items(session, [pair.positive for pair in others], [pair.negative for pair in others])
        return directions.description_items(session, shared, before) + texts

    middle = states.middle.unflatten(0, (2, -1))
    hidden = middle + directions.reduce_pairs(states, reduced_by).view_as(middle)
    details: dict[str, Any] = {"examples": 2 * len(pairs), "provenance": provenance}
    attribute = _attribute(session, name, hidden, middle, pooling, reduction, items, report, **details)
    return with_steered_layers(attribute, layers)


def description_pairs(describe: Sequence[str], against: Sequence[str], chat: bool = False) -> list[directions.Pair]:
    """Return a pair of passages for each stem, template and pair of descriptions.

    Args:
        describe: descriptions of the positive side; the k-th belongs to the k-th of `against`.
        against: descriptions of the negative side.
        chat: templates that are user turns of a chat.
    """

    def passage(stem: str, template: str, description: str) -> directions.Passage:
        # In a chat the answer starts with the stem; after a plain prompt a space separates them.
        return directions.Passage(stem if chat else f" {stem}", template.format(description.strip()), chat)

    # Stems in the outer loop: the even and the odd pairs (`separation`) then both have every stem.
    return [
        directions.Pair(passage(stem, template, one), passage(stem, template, other))
        for stem in stems()
        for template in templates(chat)
        for one, other in zip(describe, against, strict=True)
    ]


def check_descriptions(describe: Sequence[str], against: Sequence[str]) -> None:
    """Refuse descriptions that do not form pairs.

    Raises:
        ConfigError: no description, a blank one, or different numbers on the two sides.
    """
    where = "--describe, --against"
    if len(describe) != len(against) or not describe:
        hint = 'Such as --describe "a cheerful person" --against "a gloomy person".'
        what = f"{len(describe)} descriptions against {len(against)}"
        raise ConfigError(what, where=where, hint=hint)
    if not all(text.strip() for text in (*describe, *against)):
        raise ConfigError("a description is blank", where=where, hint="Describe a person or a text.")


def best_layers(layers: Sequence[int], effects: Sequence[float]) -> list[int]:
    """Return as many layers as there are default ones, those with the largest effects, in order."""
    order = sorted(range(len(layers)), key=lambda row: (-effects[row], row))
    return sorted(layers[row] for row in order[: len(default_layers(layers))])


def _uses_chat(session: Session, requested: bool | None) -> bool:
    """Return true if prompts are user turns of a chat."""
    available = has_template(session.base.tokenizer)
    if requested and not available:
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return available if requested is None else requested


def _attribute(
    session: Session,
    name: str,
    hidden: Tensor,
    reference: Tensor,
    pooling: str,
    reduction: str | None,
    items: Callable[[], Sequence[directions.Item]],
    report: Report,
    **details: Any,
) -> Attribute:
    """Return an attribute of the session's base.

    Args:
        hidden, reference: pooled states, (2, layers, d) each.
        items: returns the texts whose odds the steering vector raises, for the reduction "gradient".
        details: other fields of `Attribute`.
    """
    fields: dict[str, Any] = {"words": [], **details}
    attribute = Attribute(
        name=name,
        hidden=hidden,
        reference=reference,
        residual=output_norms(session),
        layers=[ffn.layer for ffn in session.ffns],
        sizes=session.base.sizes,
        samples=session.base.samples,
        base=session.base.name,
        pooling=pooling,
        **fields,
    )
    check_numbers(attribute, name, OVERFLOW_HINT)
    if (reduction or directions.default_reduction(session)) != GRADIENT:
        return attribute
    direction = directions.cheapest_directions(session, items(), report)
    return replace(attribute, direction=direction, provenance={**attribute.provenance, "reduction": GRADIENT})
