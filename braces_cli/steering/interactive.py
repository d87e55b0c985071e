"""`braces steer --interactive`: each line is a prompt, or a command that changes the steering of the next prompts.

Every steered text comes with an unsteered one of the same random stream, so that only the steering differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.attributes.hooks import erased_directions, steered
from braces_cli.core.attributes.lookup import find_attribute, known_attributes
from braces_cli.core.config import convert, options_of
from braces_cli.core.errors import ConfigError, near_misses
from braces_cli.core.models.ffn import chosen_layers
from braces_cli.core.options import Sampling
from braces_cli.steering.texts import generate_texts, text_requests

HELP = """\
Write a prompt to continue it, unsteered and steered; an empty line repeats the last prompt.
  /s 2                     strength; for several attributes one each (/s 2 -1), or by name (/s positive 2)
  /attribute NAME ...      steer by these attributes; without NAME: list the attributes
  /layers 2-4              steer these layers only; without a value: the default layers
  /seed 7                  seed; without a value: the next seed
  /temperature 0.7  /top-p 0.9  /top-k 50  /max-new-tokens 80
  /show                    current settings
  /help  /quit"""
_NUMBERS: dict[str, Callable[[str], Any]] = {
    "temperature": float, "top-p": float, "top-k": int, "max-new-tokens": int, "seed": int,
}  # fmt: skip
_COMMANDS = ("s", "attribute", "layers", *_NUMBERS, "show", "help", "quit")
# The two texts of a prompt.
SIDES = ("unsteered", "steered")


class Conversation:
    """The settings of a conversation, and the answers to its lines.

    Args:
        session: the open model.
        attributes: initial attributes and strengths.
        sampling: how tokens are sampled.
        folder: attribute files of the user.
        layers: decoder layers to steer, in the form of `--layers`.
        chat: prompts go through the chat template.

    Raises:
        ConfigError, ModelError: an attribute that cannot be found or read.
    """

    def __init__(
        self,
        session: Session,
        attributes: dict[str, float],
        sampling: Sampling,
        *,
        folder: Path | None = None,
        layers: str | None = None,
        scope: str = "all",
        erase: Sequence[str] = (),
        chat: bool = False,
    ) -> None:
        self.session = session
        self.sampling = sampling
        self.strengths = dict(attributes)
        self.layers = chosen_layers(session.base.model, layers)
        self._folder = folder
        self._scope = scope
        self._chat = chat
        self._find = cache(partial(find_attribute, session, folder=folder))
        self._erased = [self._find(name, for_steering=False) for name in erase]
        # The last prompt, which an empty line repeats.
        self.prompt: str | None = None
        self._unsteered: tuple[Any, str] | None = None
        for name in attributes:
            self._find(name)

    def handle(self, line: str, stream: Callable[[str, str], object] | None = None) -> dict[str, Any] | str | None:
        """Return the answer to a line: a row of texts, a note, or None for /quit.

        Args:
            line: a prompt or a command.
            stream: called with a side of `SIDES` and each piece of its text.

        Raises:
            BracesError: an invalid command; no setting has changed.
        """
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            name, *words = line[1:].replace("_", "-").split() or [""]
            return None if name in ("quit", "q", "exit") else self._command(name, words)
        prompt = line.removeprefix("/") or self.prompt
        if prompt is None:
            return HELP
        self.prompt = prompt
        return self._texts(prompt, stream)

    def shown(self) -> str:
        """Return the current settings in one line."""
        what = ", ".join(f"{name} {s:+g}" for name, s in self.strengths.items()) or "no attribute"
        layers = "" if self.layers is None else f", layers {', '.join(map(str, sorted(self.layers)))}"
        return f"{what}, seed {self.sampling.seed}, temperature {self.sampling.temperature:g}{layers}"

    def _texts(self, prompt: str, stream: Callable[[str, str], object] | None) -> dict[str, Any]:
        plain, moved = (None if stream is None else partial(stream, side) for side in SIDES)
        key = (prompt, self.sampling)
        if self._unsteered is None or self._unsteered[0] != key:
            self._unsteered = key, self._text(prompt, plain)
        elif plain is not None:
            plain(self._unsteered[1])
        terms = [(self._find(name), s) for name, s in self.strengths.items()]
        erased = erased_directions(self.session, self._erased, self.layers)
        with steered(self.session, terms, self.layers, self._scope, erased):
            text = self._text(prompt, moved)
        row = {"prompt": prompt, "text": text, "attributes": dict(self.strengths), "sample": 0}
        return row | {"seed": self.sampling.seed, "unsteered": self._unsteered[1]}

    def _text(self, prompt: str, write: Callable[[str], object] | None) -> str:
        """Return one text of the session as it is steered now."""
        stream = None if write is None else lambda request, piece: write(piece)
        (text,) = generate_texts(self.session, text_requests([prompt]), self.sampling, chat=self._chat, stream=stream)
        return text

    def _command(self, name: str, words: list[str]) -> str:
        if name == "help":
            return HELP
        if name == "s":
            self.strengths = self._strengths(words)
        elif name in ("attribute", "attributes"):
            if not words:
                return f"Attributes: {', '.join(known_attributes(self.session, self._folder))}."
            for word in words:
                self._find(word)
            # The k-th attribute keeps the k-th strength, to compare attributes at the same strength.
            strengths = chain(self.strengths.values(), repeat(1.0))
            self.strengths = dict(zip(dict.fromkeys(words), strengths, strict=False))
        elif name == "layers":
            self.layers = chosen_layers(self.session.base.model, " ".join(words) or None)
        elif name in _NUMBERS:
            self.sampling = self._changed(name, words)
        elif name != "show":
            hint = f"{near_misses(name, _COMMANDS)} /help shows all; // begins a prompt with a slash.".strip()
            raise ConfigError("no such command", where=f"/{name}", hint=hint)
        return self.shown()

    def _changed(self, name: str, words: list[str]) -> Sampling:
        if name == "seed" and not words:
            return replace(self.sampling, seed=self.sampling.seed + 1)
        field = name.replace("-", "_")
        if len(words) != 1:
            hint = f"Such as /{name} {getattr(Sampling(), field) or 50}."
            raise ConfigError("this needs one number", where=f"/{name}", hint=hint)
        return replace(self.sampling, **{field: convert(options_of(Sampling)[field], words[0], f"/{name}")})

    def _strengths(self, words: list[str]) -> dict[str, float]:
        names = list(self.strengths)
        if len(words) == 2 and words[0] in names:
            names, words = words[:1], words[1:]
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) != len(names) or not all(abs(value) < float("inf") for value in values) or not values:
            expected = f"{len(names)} numbers ({', '.join(names)})" if len(names) > 1 else "a number"
            hint = "Such as /s 2 or /s -1.5." if names else "Name an attribute first: /attribute positive."
            raise ConfigError(f"this needs {expected}", where="/s", hint=hint)
        return self.strengths | dict(zip(names, values, strict=True))
