"""The generation loop of steering, sweeps and evaluation: prompts -> texts, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice, repeat, tee
from typing import Any

from braces_cli.core.adapter.model import Session
from braces_cli.core.distributed import ALONE, Processes
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.tokenize import chat_ids, has_template, turn_ends
from braces_cli.core.options import Sampling
from braces_cli.core.progress import Report, silent
from braces_cli.steering.prompts import PromptRow

# Returns a context that steers the model for the requests of a batch.
Steering = Callable[[Sequence[TextRequest]], AbstractContextManager[Any]]


def uses_chat_template(session: Session, setting: bool | None) -> bool:
    """Return true if prompts go through the chat template: `setting`, or by default as the adapter was trained.

    Raises:
        ConfigError: `setting` is true, and the tokenizer has no chat template.
        ModelError: the adapter was trained on chats, and the tokenizer has no chat template.
    """
    trained = session.config.training.get("chat_template") if session.config is not None else False
    use_template = bool(trained if setting is None else setting)
    if use_template and not has_template(session.base.tokenizer):
        if setting is None:
            hint = "Add --no-apply-chat-template, or name the adapter's own base with --model."
            where = str(session.folder)
            raise ModelError("trained on chats, and the tokenizer has no chat template", where=where, hint=hint)
        hint = "Leave it out, or use a model that was tuned on chats."
        raise ConfigError("the tokenizer has no chat template", where="--apply-chat-template", hint=hint)
    return use_template


def text_requests(prompts: Iterable[str], samples: int = 1) -> Iterator[TextRequest]:
    """Return the requests of prompts in order; the samples of a prompt are adjacent."""
    return row_requests(map(PromptRow, prompts), {}, samples)


def row_requests(rows: Iterable[PromptRow], attributes: Mapping[str, float], samples: int = 1) -> Iterator[TextRequest]:
    """Return the requests of rows, with the attributes of the row, or `attributes` if the row has none."""
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
    """Yield continuations in the order of `requests`; one batch of requests is read at a time.

    Several processes take turns with batches, and each yields all texts. The batches are those of a single process,
    because rounding in a batch affects its texts: so the texts are the same, in every dtype.

    Args:
        session: the open model.
        requests: prompts with their samples.
        sampling: how tokens are sampled.
        batch_size: requests per batch.
        chat: prompts go through the chat template.
        steering: context of each batch.
        stream: called with each piece of a text; requires a batch size of 1.
        stage: name of the work for `report`.
        done: texts of an earlier run, for `report`.
        total: all texts, for `report`.
        report: progress.
        processes: processes that share the batches; all must have the same requests.

    Raises:
        ConfigError: a prompt that leaves no room for the new tokens.
        DataError: the chat template refuses a prompt.
    """
    model, tokenizer = session.base.model, session.base.tokenizer
    requests, ends = iter(requests), [*session.turn_ends, *(turn_ends(tokenizer) if chat else ())]
    while batches := list(islice(requests, batch_size * processes.size)):
        batch, texts = batches[processes.rank * batch_size :][:batch_size], []
        if chat:
            batch = [replace(request, ids=chat_ids(tokenizer, request.prompt)) for request in batch]
        write = None if stream is None else lambda piece, request=batch[0]: stream(request, piece)
        if batch:
            with steering(batch):
                texts = generate(model, tokenizer, batch, sampling, write, ends)
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
    """Yield rows `{prompt, text, attributes, sample, seed}` in order.

    Args:
        session, requests, sampling, steering, batch_size, chat, processes: see `generate_texts`.
        with_unsteered: rows also have the `unsteered` text of the same random stream.
        details: other arguments of `generate_texts`.
    """
    streams = tee(requests, 3 if with_unsteered else 2)
    shared: dict[str, Any] = {"batch_size": batch_size, "chat": chat, "processes": processes}
    unsteered = generate_texts(session, streams[2], sampling, **shared) if with_unsteered else repeat(None)
    texts = generate_texts(session, streams[1], sampling, steering=steering, **shared, **details)
    # `zip` alternates, so that no stream is more than a batch ahead of the others.
    for request, plain, text in zip(streams[0], unsteered, texts, strict=False):
        row = {
            "prompt": request.prompt,
            "text": text,
            "attributes": dict(request.attributes),
            "sample": request.sample,
            "seed": sampling.seed,
        }
        yield row if plain is None else row | {"unsteered": plain}
