"""Text as it is generated: handed on piece by piece, and ended by texts rather than tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from braces_cli.core.models.tokenization import decode_continuation


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to where the first of `stops` begins."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class StopTexts(StoppingCriteria):
    """Ends each row of a batch as soon as its continuation contains one of `stops`."""

    def __init__(self, tokenizer: Any, prompts: Sequence[list[int]], width: int, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._width = width
        self._stops = stops

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        new = input_ids[:, self._width :].tolist()
        texts = (decode_continuation(self._tokenizer, *row) for row in zip(self._prompts, new, strict=True))
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


class TextStream(BaseStreamer):
    """Calls `write` with each new piece of one text; what could still change is held back.

    That is half a character (a token can hold one), and what may turn out to be the beginning of a stop text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        ends: Sequence[int],
        stops: Sequence[str],
        write: Callable[[str], object],
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._ends = ends
        self._stops = stops
        self._write = write
        self._ids: list[int] | None = None
        self._written = ""
        self._over = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, at the first call, and then token after token."""
        if self._ids is None:
            self._ids = []
            return
        for token in value.reshape(-1).tolist():
            self._over = self._over or token in self._ends
            if not self._over:
                self._ids.append(token)
        text = self._text()
        withheld = max((_overlap(text, stop) for stop in self._stops), default=0)
        withheld = max(withheld, len(text) - len(text.rstrip("\ufffd")))
        self._pass_on(text[: len(text) - withheld])

    def end(self) -> None:
        """Pass on what was held back."""
        self._pass_on(self._text())

    def _text(self) -> str:
        return cut(decode_continuation(self._tokenizer, self._prompt, self._ids or []), self._stops)

    def _pass_on(self, text: str) -> None:
        if text.startswith(self._written) and len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
