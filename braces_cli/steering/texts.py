"""Whether prompts are turns of a chat, for models that were tuned on them.

Prompts -> texts, batch by batch: the one generation loop of steering, sweeps and the evaluation of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice, repeat, tee
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.distributed import ALONE, Processes
from braces_cli.core.errors import ConfigError
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.tokenize import chat_ids as chat_ids
from braces_cli.core.models.tokenize import encode_answer as encode_answer
from braces_cli.core.models.tokenize import has_template as has_template
from braces_cli.core.options import Sampling
from braces_cli.core.progress import Report, silent
from braces_cli.steering.prompts import PromptRow


def uses_chat_template(session: Session, setting: bool | None) -> bool:
    """Whether prompts go through the chat template: as `setting` says, else as the adapter was trained.

    Raises:
        ConfigError: they do, and the tokenizer has none.
    """
    trained = session.config.training.get("chat_template") if session.config is not None else False
    use_template = bool(trained if setting is None else setting)
    if use_template and not has_template(session.base.tokenizer):
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return use_template


# Steers the open model, as the requests of a batch want it, while it is entered.
Steering = Callable[[Sequence[TextRequest]], AbstractContextManager[Any]]


def text_requests(prompts: Iterable[str], samples: int = 1) -> Iterator[TextRequest]:
    """The texts that a run generates, in order: the samples of a prompt stand together."""
    return (TextRequest(prompt, index, k) for index, prompt in enumerate(prompts) for k in range(samples))


def row_requests(rows: Iterable[PromptRow], attributes: Mapping[str, float], samples: int = 1) -> Iterator[TextRequest]:
    """The same, each with the attributes of its row, and with `attributes` where the row names none."""
    return (
        TextRequest(row.text, index, k, attributes=attributes if row.attributes is None else row.attributes)
        for index, row in enumerate(rows)
        for k in range(samples)
    )


def generate_texts(
    session: Session,
    requests: Iterable[TextRequest],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    chat: bool = False,
    steering: Steering = nullcontext,
    stream: Callable[[TextRequest, str], object] | None = None,
    stage: str = "generating",
    done: int = 0,
    total: int | None = None,
    report: Report = silent,
    processes: Processes = ALONE,
) -> Iterator[str]:
    """Continuations in the order of `requests`, as each batch is done; only one batch of requests is held at a time.

    Several processes generate whole batches in turns, and each of them gets all texts. The batches are those of one
    process, since a text depends on its batch by rounding: so the texts are the same, in every number format.

    Args:
        chat: prompts go through the chat template.
        steering: entered around each batch, in addition to how the session is steered already.
        stream: called with each piece of a text; for batches of one.
        stage: what `report` calls the work.
        done: texts that an earlier run has generated, of `total` in all; for `report` only.
        processes: share the batches out; each must have the same requests.

    Raises:
        ConfigError: no room for a prompt beside the new tokens.
        DataError: the chat template refuses a prompt.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    requests = iter(requests)
    while batches := list(islice(requests, batch_size * processes.size)):
        batch, texts = batches[processes.rank * batch_size :][:batch_size], []
        if chat:
            batch = [replace(request, ids=chat_ids(tokenizer, request.prompt)) for request in batch]
        write = None if stream is None else lambda piece, request=batch[0]: stream(request, piece)
        if batch:
            with steering(batch):
                texts = generate(model, tokenizer, batch, sampling, write)
        shared = processes.gather(texts)
        done += len(batches)
        report(stage, done, total)
        for part in shared:
            yield from part


def generate_rows(
    session: Session,
    requests: Iterable[TextRequest],
    sampling: Sampling,
    *,
    steering: Steering = nullcontext,
    with_unsteered: bool = False,
    batch_size: int = 8,
    chat: bool = False,
    processes: Processes = ALONE,
    **details: Any,
) -> Iterator[dict[str, Any]]:
    """Rows `{prompt, text, attributes, sample, seed}` of the texts, in order.

    Args:
        steering: see `generate_texts`.
        beside: rows also get the `unsteered` text of the same random stream.
        processes: see `generate_texts`.
        details: further arguments of `generate_texts`.
    """
    streams = tee(requests, 3 if with_unsteered else 2)
    how: dict[str, Any] = {"batch_size": batch_size, "chat": chat, "processes": processes}
    unsteered = generate_texts(session, streams[2], sampling, **how) if with_unsteered else repeat(None)
    texts = generate_texts(session, streams[1], sampling, steering=steering, **how, **details)
    # Drawn in turns, so that no stream is more than a batch ahead of the others.
    for request, plain, text in zip(streams[0], unsteered, texts, strict=False):
        row = {
            "prompt": request.prompt,
            "text": text,
            "attributes": dict(request.attributes),
            "sample": request.sample,
            "seed": sampling.seed,
        }
        yield row if plain is None else row | {"unsteered": plain}
