"""Invariants of generation: batch size, left padding, cache, sums of attributes; streams and stop texts."""

from dataclasses import replace

import pytest
import torch

from braces_cli.core.adapter.model import Session, attach
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.models.generate import TextRequest, generate
from braces_cli.core.models.load import Base
from braces_cli.core.options import Sampling
from tests.conftest import ARCHITECTURES, open_gates, tiny_model, tiny_tokenizer

PROMPTS = ["the film is", "a", "the end of the old town"]
REQUESTS = [TextRequest(prompt, index) for index, prompt in enumerate(PROMPTS)]
TOKENS = 6
# On logits.
TOLERANCE = 1e-4


def opened(name: str, with_adapter: bool) -> Session:
    base = Base(tiny_model(name), tiny_tokenizer(), name)
    session = Session(base)
    if with_adapter:
        session.adapter = attach(base.model, 4)
        open_gates(session.adapter)
    return session


def recorded(
    session: Session, requests: list[TextRequest], sampling: Sampling
) -> tuple[list[str], torch.Tensor, list[list[int]]]:
    """Texts of a batch, the logits of each new token (requests, tokens, vocabulary), and the rows of tokens."""
    steps, ids = [], []
    model = session.base.model
    head = model.get_output_embeddings().register_forward_hook(lambda m, a, out: steps.append(out[:, -1].float()))
    step = model.generate

    def watched(**kwargs):
        ids.append(step(**kwargs))
        return ids[0]

    model.generate = watched
    try:
        texts = generate(model, session.base.tokenizer, requests, sampling)
    finally:
        head.remove()
        del model.generate
    return texts, torch.stack(steps, 1), ids[0].tolist()


@pytest.mark.parametrize(("name", "with_adapter"), [*((name, True) for name in ARCHITECTURES), ("llama", False)])
def test_a_padded_batch_with_a_cache_equals_single_texts_without(name, with_adapter):
    """Logits of every drawn token, steered, against passes without padding and without a cache."""
    session = opened(name, with_adapter)
    good = build_attribute(session, "good", ["good", "happy"])
    sampling = Sampling(max_new_tokens=TOKENS, seed=3)
    # After an end token there would be nothing to compare.
    session.base.model.generation_config.eos_token_id = None
    session.base.tokenizer.eos_token = None
    with steered(session, [(good, 3.0)]):
        texts, logits, rows = recorded(session, REQUESTS, sampling)
        bare = []
        for request, row, expected, text in zip(REQUESTS, rows, logits, texts, strict=True):
            alone, one_by_one, _ = recorded(session, [request], sampling)
            assert alone == [text]
            assert float((one_by_one[0] - expected).abs().max()) < TOLERANCE
            prompt = session.base.tokenizer(request.prompt)["input_ids"]
            whole = torch.tensor([[*prompt, *row[-TOKENS:]]])
            with torch.no_grad():
                uncached = session.base.model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
            assert float((uncached - expected).abs().max()) < TOLERANCE
            bare.append(whole)
    # The comparison can fail: the unsteered model has other logits.
    with torch.no_grad():
        other = session.base.model(bare[0], use_cache=False).logits[0, -1 - TOKENS : -1]
    assert float((other - logits[0]).abs().max()) > 100 * TOLERANCE


def test_the_pieces_of_a_stream_are_the_text(session):
    """Complete characters only, and the text is that without a stream."""
    model, tokenizer = session.base.model, session.base.tokenizer
    for request in REQUESTS:
        for sampling in (Sampling(20), Sampling(20, temperature=0), Sampling(20, stop=("e",))):
            pieces: list[str] = []
            (text,) = generate(model, tokenizer, [request], sampling, pieces.append)
            assert "".join(pieces) == text == generate(model, tokenizer, [request], sampling)[0]
            assert all(pieces)
    assert len(pieces) > 0


def test_incomplete_characters_and_stop_texts_are_withheld():
    """A token can end inside a character, or inside a stop text."""
    from braces_cli.core.models.generate import TextStream

    def streamed(text, stops=(), ends=()):
        pieces: list[str] = []
        stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), ends, stops, pieces.append)
        stream.put(torch.tensor([[1, 2]]))  # the prompt
        for byte in text.encode():
            stream.put(torch.tensor([byte]))
        shown = list(pieces)
        stream.end()
        return shown, "".join(pieces)

    assert streamed("né") == (["n", "é"], "né")
    assert streamed("a..b", stops=("...",)) == (["a", "..b"], "a..b")
    assert streamed("a...b", stops=("...",)) == (["a"], "a")
    assert streamed("a..", stops=("...",)) == (["a"], "a..")
    assert streamed("ab!cd", ends=(ord("!"),)) == (["a", "b"], "ab")


def test_stop_texts_end_each_row(session):
    """Each text is cut before its first stop text; generation ends when every row has one."""
    plain = Sampling(30, seed=1)
    whole, _, _ = recorded(session, REQUESTS, plain)
    stops = (whole[0][5:7], whole[2][3:4])
    cut, _, _ = recorded(session, REQUESTS, replace(plain, stop=stops))
    for text, expected in zip(cut, whole, strict=True):
        places = [place for stop in stops if (place := expected.find(stop)) >= 0]
        assert text == (expected[: min(places)] if places else expected)
    assert len(cut[0]) <= 5
    _, short, _ = recorded(session, REQUESTS[:1], replace(plain, stop=(whole[0][:1],)))
    assert short.shape[1] < 30


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1, top_p=0.9),
        Sampling(1, top_p=1.0),
        Sampling(1, temperature=3.0, top_p=0.999),
        Sampling(1, top_p=0.5, top_k=7),
        Sampling(1, top_p=1.0, top_k=2000),
    ],
)
def test_a_draw_is_that_of_the_sorted_vocabulary(sampling):
    """Inverted by hand; flat and steep rows, with equal probabilities at the edges."""
    from braces_cli.core.models.generate import _Draw

    generator = torch.Generator().manual_seed(0)
    rows, vocabulary = 64, 3000
    scores = torch.randn(rows, vocabulary, generator=generator) * torch.linspace(0, 6, rows)[:, None]
    scores = (scores * 4).round() / 4  # as bfloat16 leaves many tokens with one probability
    uniforms = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
    drawn = _Draw(sampling, uniforms, 1)(torch.zeros(rows, 1, dtype=torch.long), scores).argmax(dim=-1)
    for row in range(rows):
        order = sorted(range(vocabulary), key=lambda token, row=row: (-float(scores[row, token]), token))
        ordered = (scores[row, order].double() / sampling.temperature)[: sampling.top_k]
        mass = ordered.softmax(dim=0).cumsum(dim=0)
        kept = int((mass < sampling.top_p - 1e-9).sum().clamp(max=len(mass) - 1))
        goal = float(uniforms[row, 0]) * float(mass[kept])
        near = [int((mass <= goal + slack).sum().clamp(max=kept)) for slack in (-1e-5, 1e-5)]
        assert int(drawn[row]) in [order[place] for place in range(near[0], near[1] + 1)]
    alone = _Draw(sampling, uniforms[5:6], 1)(torch.zeros(1, 1, dtype=torch.long), scores[5:6]).argmax(dim=-1)
    assert int(alone) == int(drawn[5])


@pytest.mark.parametrize(
    ("name", "value"),
    [("no_repeat_ngram_size", 1), ("max_time", 0.0), ("return_dict_in_generate", True), ("num_return_sequences", 2)],
)
def test_the_generation_config_of_the_base_does_not_change_sampling(session, name, value):
    """It is restored afterwards; the tokens that it suppresses are not drawn."""
    model, sampling = session.base.model, Sampling(max_new_tokens=12, temperature=0)
    plain, _, rows = recorded(session, REQUESTS, sampling)
    own = model.generation_config
    setattr(own, name, value)
    assert generate(model, session.base.tokenizer, REQUESTS, sampling) == plain
    assert model.generation_config is own
    assert getattr(own, name) == value
    setattr(own, name, None)
    own.suppress_tokens = [rows[0][-1]]
    assert own.suppress_tokens[0] not in recorded(session, REQUESTS, sampling)[2][0][-12:]
