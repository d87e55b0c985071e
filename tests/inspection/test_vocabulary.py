"""The vectors of an FFN, the logit lens and the tokens of value vectors, each against a direct computation."""

import copy

import pytest
import torch

from braces_cli.inspection import vocabulary
from braces_cli.inspection.vocabulary import LogitLens, value_tokens
from tests.conftest import ARCHITECTURES, tiny_model
from tests.core.architectures import tiny
from tests.inspection.conftest import opened


@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("tokens_at_once", [1, 37, 200])
def test_best_tokens_in_blocks(session, monkeypatch, k, tokens_at_once):
    """The k highest scores, also if k is larger than a block; of equal listed scores the lower token comes first."""
    monkeypatch.setattr(vocabulary, "_TOKENS_AT_ONCE", tokens_at_once)
    lens = LogitLens(session.base)
    generator = torch.Generator().manual_seed(k)
    lens.weight = torch.randint(-2, 3, lens.weight.shape, generator=generator).float()
    lens.weight[50:] = lens.weight[:46].clone()
    vectors = session.ffns[0].value_matrix().mT.detach()
    scores = lens.hidden(vectors) @ lens.weight.mT
    order = scores.sort(dim=1, descending=True, stable=True)
    values, ids = lens.best(vectors, k)
    assert torch.allclose(values, order.values[:, :k], atol=1e-5)
    assert torch.allclose(values, scores.gather(1, ids), atol=1e-5)
    equal = values[:, 1:] == values[:, :-1]
    assert equal.any() == (k > 1)
    assert (ids[:, 1:] > ids[:, :-1])[equal].all()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_lens_equals_norm_and_head(name, monkeypatch):
    """Best tokens and ranks of every architecture, with block sizes that do not divide the numbers evenly."""
    monkeypatch.setattr(vocabulary, "_TOKENS_AT_ONCE", 37)
    monkeypatch.setattr(vocabulary, "VECTORS_AT_ONCE", 11)
    session = opened(name)
    model, lens = session.base.model, LogitLens(session.base)
    vectors = session.ffns[1].value_matrix().mT.detach()
    seen = []
    handle = lens.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.tensor([[4, 5, 6]])).logits
        assert torch.allclose(model.get_output_embeddings()(seen[0]), logits, atol=1e-4)
        handle.remove()
        expected = model.get_output_embeddings()(lens.norm(vectors))
    values, ids = lens.best(vectors, 7)
    assert torch.allclose(values, expected.sort(dim=1, descending=True).values[:, :7], atol=1e-5)
    assert torch.allclose(values, expected.gather(1, ids), atol=1e-5)
    ranks, scores = lens.ranks(vectors, [3, 50])
    assert torch.allclose(scores, expected[:, [3, 50]], atol=1e-5)
    assert (ranks[:, 0] == (expected > expected[:, [3]]).sum(dim=1) + 1).float().mean() > 0.95


def test_lens_of_an_offloaded_head(opened_twice):
    """A head that is not in memory gives the same scores."""
    plain, offloaded = opened_twice("phi")
    vectors = plain.ffns[0].value_matrix().mT.detach()
    expected, found = (LogitLens(session.base).best(vectors, 5) for session in (plain, offloaded))
    assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[0], expected[0], atol=1e-5)


def test_lens_in_half_precision():
    """bfloat16 weights give scores near the model's, for every dtype of the products."""
    session = opened(tiny_model("llama", torch.bfloat16))
    model = session.base.model
    vectors = session.ffns[0].value_matrix().mT.detach()
    values, ids = LogitLens(session.base).best(vectors, 5)
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(vectors)).float()
    assert torch.allclose(values, expected.gather(1, ids), rtol=2e-2, atol=2e-1)
    # Ranks have no ties of half precision: they are those of the same weights in float32.
    exact = opened(copy.deepcopy(model).float())
    found, wanted = (
        LogitLens(each.base).ranks(each.ffns[0].value_matrix().mT.detach(), [3, 50]) for each in (session, exact)
    )
    assert torch.equal(found[0], wanted[0])
    assert torch.allclose(found[1], wanted[1], rtol=1e-5)


def expected_scores(model):
    """Scores (value vectors, vocabulary) of each layer, from the model's modules, expert by expert."""
    for layer in model.model.layers:
        mlp = layer.mlp
        if hasattr(mlp, "experts"):
            parts = [weight.T for weight in mlp.experts.down_proj]
            shared = getattr(mlp, "shared_experts", None)
            vectors = torch.cat(parts if shared is None else [*parts, shared.down_proj.weight.T])
        else:
            vectors = mlp.down_proj.weight.T
        yield model.lm_head(model.model.norm(vectors)).detach()


def check_values(session, top_k):
    """Compare the tokens of every value vector with a stable sort of all scores; return the number of vectors."""
    rows = {
        (row["layer"], row["index"]): row["tokens"]
        for row in value_tokens(LogitLens(session.base), session.ffns, top_k=top_k)
    }
    count = len(rows)
    for layer, scores in enumerate(expected_scores(session.base.model)):
        assert len(scores) == next(ffn for ffn in session.ffns if ffn.layer == layer).value_vectors
        best = scores.sort(dim=1, descending=True, stable=True)
        for index in range(len(scores)):
            tokens = rows.pop((layer, index))
            values = best.values[index]
            assert [token["score"] for token in tokens] == pytest.approx(values[:top_k].tolist(), rel=1e-4, abs=1e-5)
            # If two scores differ by rounding only, either may come first.
            if (values[:top_k] - values[1 : top_k + 1]).min() > 1e-5:
                assert [token["id"] for token in tokens] == best.indices[index, :top_k].tolist()
    assert not rows
    return count


def test_value_tokens_of_a_trained_model(shared):
    """Every value vector of stories260K."""
    from braces_cli.core.adapter.model import open_session
    from braces_cli.core.options import LoadOptions

    session = open_session(str(shared / "models" / "stories260K"), None, LoadOptions(device="cpu", dtype="float32"))
    assert check_values(session, 10) == 5 * 172


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_value_tokens_of_experts(name, monkeypatch):
    """Every layer, expert and index, in blocks that do not divide the experts evenly."""
    monkeypatch.setattr(vocabulary, "VECTORS_AT_ONCE", 11)
    session = opened(tiny(name).eval())
    check_values(session, 4)
    lens, ffns = LogitLens(session.base), [ffn for ffn in session.ffns if ffn.layer == 1]
    (row,) = value_tokens(lens, ffns, indices=[60], top_k=4)
    other = next(each for each in value_tokens(lens, ffns, top_k=4) if each["index"] == 60)
    assert (row["layer"], row["index"]) == (1, 60)
    assert [token["id"] for token in row["tokens"]] == [token["id"] for token in other["tokens"]]
