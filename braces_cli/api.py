"""Python interface for notebooks and scripts: `load`, `train` and `Model`, the result of `load`.

    import braces_cli as braces

    braces.train("rows.jsonl", "out", max_steps=200)
    model = braces.load("out")
    model.generate("The film is")
    model.steer("positive", 2).generate("The film is")

Names and defaults are those of the command line. Errors are the classes of `core.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

from braces_cli.core.adapter.files import CONFIG_FILE
from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.attributes.options import AttributeSettings, SteeredTokens
from braces_cli.core.attributes.vector import Attribute
from braces_cli.core.attributes.words import clean_words
from braces_cli.core.config import build, option
from braces_cli.core.errors import ConfigError
from braces_cli.core.files import user_path
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.models.structure import uncompiled
from braces_cli.core.options import AdapterSettings, Sampling, SteeredLayers
from braces_cli.inspection.summary import summarise
from braces_cli.steering.texts import generate_texts, text_requests, uses_chat_template
from braces_cli.training.run import train as run_training
from braces_cli.training.settings import TrainSettings

Name = str | PathLike[str]


@dataclass(frozen=True, kw_only=True)
class _Steering(AttributeSettings, SteeredLayers, SteeredTokens):
    """Arguments of `Model.steer`."""


@dataclass(frozen=True)
class _Generation:
    """Arguments of `Model.generate` other than those of `Sampling`.

    Attributes:
        prompts: Texts to continue.
        batch_size: Prompts at a time.
        apply_chat_template: Prompts as a user's turn.
    """

    prompts: tuple[str, ...] = option()
    batch_size: int = option(8, min=1)
    apply_chat_template: bool | None = option(None)


@dataclass(frozen=True)
class Model:
    """A base model with an optional adapter, and the attributes that steer it.

    Attributes:
        session: the open model, shared by the results of `steer`.
        terms: attributes with their strengths.
        layers: steered layers, such as `8-20,24`; None is the default of `braces steer`.
        scope: steered tokens, as in `braces steer`.
    """

    session: Session
    terms: tuple[tuple[Attribute, float], ...] = ()
    layers: str | None = None
    scope: str = "all"

    def __repr__(self) -> str:
        """Base, adapter and attributes, without the modules."""
        stored = self.session.stored
        parts = [self.session.base.name, *([] if stored is None else [stored.name])]
        return f"Model({', '.join([*parts, *(f'{attribute.name} {s:+g}' for attribute, s in self.terms)])})"

    def steer(
        self,
        attribute: str,
        strength: float = 1.0,
        *,
        words: Sequence[str] | None = None,
        attributes: Name | None = None,
        layers: str | int | Sequence[int] | None = None,
        scope: str | None = None,
    ) -> Model:
        """Return the model steered by one more attribute; this object is unchanged.

        Args:
            attribute: name of an attribute: of the adapter, of the folder `attributes`, or built in.
            strength: direction and intensity; negative is away from the attribute, 0 changes nothing.
            words: build the attribute from these words.
            attributes: folder that `braces attr-build` wrote.
            layers: steered decoder layers, such as `8-20,24` or `range(8, 21)`.
            scope: steered tokens: `all`, `prompt` or `generated`; None: as this model, at first all.

        Raises:
            ConfigError: an unknown attribute, or one that already steers this model; no words; a value of another type.
        """
        wanted = {"attribute": attribute, "s": strength, "attributes": attributes, "layers": layers}
        given = build(_Steering, wanted | {"scope": scope or self.scope}, python=True)
        (attribute,), (strength,) = given.attribute, given.s
        if any(attribute == each.name for each, _ in self.terms):
            hint = "Steer the result of load(), with another strength."
            raise ConfigError(f"the model is already steered by `{attribute}`", hint=hint)
        chosen = None if words is None else clean_words([words] if isinstance(words, str) else list(words))
        if chosen == []:
            raise ConfigError("no words", where="words", hint="Give at least one word.")
        with uncompiled(self.session.base.model):
            if chosen is None:
                found = find_attribute(self.session, attribute, given.attributes)
            else:
                found = build_attribute(self.session, attribute, chosen, reduction=None)
        return Model(self.session, (*self.terms, (found, strength)), given.layers or self.layers, given.scope)

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 8,
        apply_chat_template: bool | None = None,
        **sampling: Any,
    ) -> str | list[str]:
        """Return the continuation of a prompt, or a list of the continuations of several, without the prompts.

        Args:
            batch_size: prompts at a time.
            apply_chat_template: format prompts as a user's turn; None: as in training.
            sampling: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `seed` and `stop`, see
                `core.options.Sampling`.

        Raises:
            ConfigError: an unknown option, or a value that is out of range or of another type.
        """
        given = {"prompts": prompts, "batch_size": batch_size, "apply_chat_template": apply_chat_template}
        wanted, how = build(_Generation, given, python=True), build(Sampling, sampling, python=True)
        layers = chosen_layers(self.session.base.model, self.layers)
        chat = uses_chat_template(self.session, wanted.apply_chat_template)
        with steered(self.session, self.terms, layers, self.scope):
            requests = text_requests(wanted.prompts)
            texts = list(generate_texts(self.session, requests, how, batch_size=wanted.batch_size, chat=chat))
        return texts[0] if isinstance(prompts, str) else texts

    def inspect(self) -> dict[str, Any]:
        """Return the keys of `braces inspect --format json`: sizes, gates and projections of each layer."""
        return summarise(self.session.base, self.session.stored, is_attached=self.session.adapter is not None)


def load(name: Name | None = None, *, adapter: Name | None = None, **options: Any) -> Model:
    """Open a model.

    Args:
        name: folder of an adapter, or folder, hub id or GGUF file of a base model. None: the adapter's base, else the
            embedded model.
        adapter: folder or hub id of an adapter.
        options: `device`, `dtype`, `quantize` and others, see `core.options.LoadOptions`.

    Raises:
        ConfigError: two adapters, an unknown option or device, or a value of another type.
        ModelError: model or adapter cannot be loaded, or they do not fit.
    """
    given = build(AdapterSettings, {"model": name, "adapter": adapter, **options}, python=True)
    model, stored = given.model, given.adapter
    folder = None if model is None else user_path(model)
    if folder is not None and (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        if stored is not None:
            raise ConfigError("two adapters", where=model, hint="Give the folder or hub id of a base model, or none.")
        model, stored = None, model
    return Model(open_session(model, stored, given))


def train(data: Name | Sequence[Name], output_dir: Name, **settings: Any) -> dict[str, Any]:
    """Train an adapter like `braces train`; return the keys of its `--format json`.

    Args:
        data: files or hub sets of training rows.
        output_dir: folder for the adapter, an argument of `load`.
        settings: options of `braces train` by name, with underscores, such as `max_steps=200`. Repeatable ones take one
            value or a list, `columns` a mapping, too.

    Raises:
        ConfigError: an unknown setting, a value of another type, or settings that do not fit together.
        DataError: rows that cannot be read.
        ModelError: the base cannot be loaded.
    """
    given = {"data": data, "output_dir": output_dir, **settings}
    return run_training(build(TrainSettings, given, python=True))
