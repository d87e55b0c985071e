"""Generate continuations in batches: left padding, KV cache, stop texts, streaming, one random stream per text.

Each text has a random stream of (seed, prompt index, sample), so its random numbers depend neither on the batch nor on
where a run was resumed. The logits depend on the batch by rounding, because matrix products of other sizes are summed
in another order. In float32 that hardly ever changes a token; in bfloat16 and float16 it changes many texts.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from braces_cli.core.errors import ConfigError, ModelError, logger
from braces_cli.core.models.load import input_device
from braces_cli.core.models.tokenize import context_length, decode_continuation, encode, end_tokens, is_token, pad_left
from braces_cli.core.models.weights import OVERFLOW_HINT
from braces_cli.core.options import Sampling


def cut(text: str, stops: Sequence[str]) -> str:
    """Return `text` up to the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


@dataclass
class _Prompts:
    """Lengths of the prompts of a batch, (rows, 1) or (1, 1), and the number of tokens that the model has read."""

    lengths: Tensor
    read: int = 0


_prompts: ContextVar[_Prompts | None] = ContextVar("prompts", default=None)


@contextmanager
def prompt_lengths(lengths: Tensor) -> Iterator[None]:
    """Declare the number of prompt tokens, padding included, in each row that the model reads in the `with` block.

    Args:
        lengths: (rows, 1), or (1, 1) for all rows; the tokens after them are generated.
    """
    token = _prompts.set(_Prompts(lengths.cpu()))
    try:
        yield
    finally:
        _prompts.reset(token)


def next_generated(tokens: int) -> Tensor:
    """Mark the generated tokens of the next forward pass: (rows, tokens) or (1, tokens); none without lengths.

    Args:
        tokens: number of tokens of a row in this pass: all tokens, or with a cache those that were not read yet.
    """
    prompts = _prompts.get()
    if prompts is None:
        return torch.zeros(1, tokens, dtype=torch.bool)
    start = 0 if tokens > prompts.read else prompts.read
    prompts.read = start + tokens
    return torch.arange(start, prompts.read) >= prompts.lengths


class StopTexts(StoppingCriteria):
    """Stop each row of a batch when its continuation contains one of `stops`."""

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
    """Call `write` with each new piece of one text.

    The end of the text is withheld while it can change: an incomplete character, or the beginning of a stop text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        ends: Sequence[int],
        stops: Sequence[str],
        write: Callable[[str], object],
    ) -> None:
        self._decode = decode
        self._ends = ends
        self._stops = stops
        self._write = write
        self._ids: list[int] | None = None
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Receive the prompt in the first call, then one token per call."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._write_text(is_over=False)

    def end(self) -> None:
        """Write the withheld end of the text."""
        self._write_text(is_over=True)

    def _write_text(self, is_over: bool) -> None:
        ids = self._ids or []
        length = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        text = cut(self._decode(ids[:length]), self._stops)
        if not is_over:
            beginnings = [stop[:size] for stop in self._stops for size in range(1, len(stop))]
            withheld = max((len(each) for each in beginnings if text.endswith(each)), default=0)
            text = text[: len(text) - max(withheld, len(text) - len(text.rstrip("\ufffd")))]
        if text.startswith(self._written) and len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


# Keys of a base's generation config that apply besides its end tokens: special and suppressed tokens. Sampling is set
# by `Sampling` alone.
_BASE_KEYS = {"bos_token_id", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}
# Number of most likely tokens that a draw searches first.
_FIRST = 1024


@dataclass(frozen=True)
class TextRequest:
    """One text to generate: `sample` counts the texts of one prompt, `index` the prompts of a run.

    Attributes:
        ids: tokens of the prompt if they are not those of the plain text, as with a chat template.
        attributes: strength of each attribute, for callers that steer; `generate` does not use it.
    """

    prompt: str
    index: int
    sample: int = 0
    ids: tuple[int, ...] | None = None
    attributes: Mapping[str, float] = field(default_factory=dict)


def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[TextRequest],
    sampling: Sampling,
    stream: Callable[[str], object] | None = None,
    turn_ends: Sequence[str] = (),
) -> list[str]:
    """Generate continuations of one batch of requests, without the prompts, up to the end token or a stop text.

    Prompts that are longer than the model's context are cut at the beginning, with a warning.

    Args:
        stream: called with each new piece of the text; for a batch of one.
        turn_ends: more end tokens and stop texts, see `tokenize.turn_ends`.

    Raises:
        ConfigError: the context has no room for a prompt and `max_new_tokens`.
        ModelError: the model computes scores that are not finite.
    """
    max_prompt_length = context_length(model.config, tokenizer) - sampling.max_new_tokens
    if max_prompt_length < 1:
        hint = f"The model takes {max_prompt_length + sampling.max_new_tokens} tokens, the prompt included."
        raise ConfigError(f"{sampling.max_new_tokens} is too much", where="--max-new-tokens", hint=hint)
    prompts = []
    for request in requests:
        ids = encode(tokenizer, request.prompt).ids if request.ids is None else list(request.ids)
        if len(ids) > max_prompt_length:
            message = "prompt %d has %d tokens; only the last %d fit"
            logger.warning(message, request.index, len(ids), max_prompt_length)
        prompts.append(ids[-max_prompt_length:])
    device = input_device(model)
    batch = {name: tensor.to(device) for name, tensor in pad_left(prompts, tokenizer.pad_token_id).items()}
    ends = end_tokens(model, tokenizer, turn_ends)
    stop_texts = [*sampling.stop, *(end for end in turn_ends if not is_token(tokenizer, end))]
    width = batch["input_ids"].shape[1]
    stops = StoppingCriteriaList([StopTexts(tokenizer, prompts, width, stop_texts)] if stop_texts else [])
    decode = partial(decode_continuation, tokenizer, prompts[0])
    streamer = None if stream is None else TextStream(decode, ends, stop_texts, stream)
    draw = _Draw(sampling, _uniforms(requests, sampling), width)
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        # Steering uses hooks, which a compiled forward pass does not follow.
        disable_compile=True,
    )
    with torch.no_grad(), _without_defaults(model), prompt_lengths(torch.tensor([[width]])):
        output = model.generate(
            **batch,
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=stops,
            streamer=streamer,
        )
    if not math.isfinite(draw.sum_of_best):
        raise ModelError("the model's scores of the next token are not finite", hint=OVERFLOW_HINT)
    texts = []
    for ids, new in zip(prompts, output[:, width:].tolist(), strict=True):
        length = next((place for place, token in enumerate(new) if token in ends), len(new))
        texts.append(cut(decode_continuation(tokenizer, ids, new[:length]), stop_texts))
    return texts


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Inside the `with` block the base's generation config sets only `_BASE_KEYS`."""
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    for name in vars(GenerationConfig()).keys() - _BASE_KEYS:
        setattr(model.generation_config, name, None)
    try:
        yield
    finally:
        model.generation_config = own


def _uniforms(requests: Sequence[TextRequest], sampling: Sampling) -> Tensor:
    """One number in [0, 1) for each request and token, (requests, max_new_tokens), float64."""
    rows = []
    for request in requests:
        key = hashlib.sha256(f"{sampling.seed}:{request.index}:{request.sample}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        rows.append(torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


class _Draw(LogitsProcessor):
    """Draw a token in each row by inverting its distribution, and leave it as the only candidate of greedy decoding.

    This uses transformers' generation loop, with its caches and stops, and one random stream per row. At temperature 0
    it changes nothing. `sum_of_best` is finite if the best score of every token was.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, prompt_length: int) -> None:
        self._sampling = sampling
        self._uniforms = uniforms
        self._start = prompt_length
        self.sum_of_best: Any = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A tensor, so that the check does not wait for the device after each token. The sum cannot overflow.
        self.sum_of_best = scores.amax(dim=-1).sum(dtype=torch.float32) + self.sum_of_best
        if self._sampling.temperature == 0:
            return scores
        goal = self._uniforms[:, input_ids.shape[1] - self._start].to(scores.device, torch.float32)
        chances = (scores.float() / self._sampling.temperature).softmax(dim=-1)
        # Sorting whole vocabularies takes longer than a small model, and few rows need it.
        width = chances.shape[1] if (self._sampling.top_k or 0) > _FIRST else min(_FIRST, chances.shape[1])
        tokens = chances.topk(width, dim=-1).indices.sort(dim=-1).values
        token, decided = self._invert(chances.gather(1, tokens), tokens, goal, width == chances.shape[1])
        rest = (~decided).nonzero().squeeze(1)
        if len(rest):
            every = torch.arange(chances.shape[1], device=scores.device).expand(len(rest), -1)
            token[rest], _ = self._invert(chances[rest], every, goal[rest], True)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)

    def _invert(self, chances: Tensor, tokens: Tensor, goal: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """Token drawn in each row, and whether the candidates decide it; candidates are in the order of the vocabulary.

        Args:
            chances: softmax over the whole vocabulary, of the candidates.
            goal: numbers in [0, 1).
            whole: the candidates are the whole vocabulary.
        """
        # Stable: tokens of equal probability have one order in every batch.
        ordered, order = chances.sort(dim=-1, descending=True, stable=True)
        least = ordered[:, -1]
        if self._sampling.top_k is not None:
            ordered = ordered[:, : self._sampling.top_k]
        last = ordered[:, -1]
        if self._sampling.top_k is not None:
            # top_p applies to the tokens that top_k leaves.
            ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        mass = ordered.cumsum(dim=-1)
        # A token remains if the sum before it is below top_p; the first always remains.
        last_index = (mass < self._sampling.top_p).sum(dim=-1).clamp(max=mass.shape[1] - 1)
        # Among tokens as likely as the least candidate, topk chose arbitrarily: none of them may be in the draw.
        edge = last if self._sampling.top_k is not None else ordered.gather(1, last_index.unsqueeze(1)).squeeze(1)
        decided = (edge > least) | whole
        reach = mass.gather(1, last_index.unsqueeze(1))
        place = torch.searchsorted(mass, goal.to(mass).unsqueeze(1) * reach, right=True).minimum(
            last_index.unsqueeze(1)
        )
        return tokens.gather(1, order.gather(1, place)).squeeze(1), decided
