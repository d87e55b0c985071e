"""Value vectors of experts: read and searched like any others; what has no meaning for them is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.inspection import search as find_module
from braces_cli.inspection import vocabulary as values_module
from braces_cli.inspection.maps import Concept
from braces_cli.inspection.search import top_vectors_for_concept
from braces_cli.inspection.trace import attribute_logits
from braces_cli.inspection.vocabulary import value_tokens
from tests.conftest import tiny_tokenizer
from tests.core.architectures import tiny


def opened(name: str) -> Any:
    model = tiny(name).eval()
    base = SimpleNamespace(model=model, tokenizer=tiny_tokenizer())
    return SimpleNamespace(base=base, ffns=find_ffns(model), adapter=None)


def direct(name: str, model: Any) -> list[tuple[int, Tensor]]:
    """(layer, scores of its value vectors), written out from the model's own weights, expert by expert."""
    stack = []
    for number, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        if not hasattr(mlp, "experts"):  # the first layers of DeepSeek
            vectors = mlp.down_proj.weight.T
        else:
            parts = [weight.T for weight in mlp.experts.down_proj]
            shared = getattr(mlp, "shared_experts", None)
            vectors = torch.cat(parts if shared is None else [*parts, shared.down_proj.weight.T])
        stack.append((number, model.lm_head(model.model.norm(vectors)).detach()))
    return stack


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_values_and_find_equal_a_direct_computation(name, monkeypatch):
    """Every layer, expert and index, in blocks that end inside an expert; the same places when some are asked for."""
    monkeypatch.setattr(values_module, "VECTORS_AT_ONCE", 11)
    monkeypatch.setattr(find_module, "VECTORS_AT_ONCE", 11)
    session = opened(name)
    rows = {(row["layer"], row["index"]): row for row in value_tokens(session, top_k=4)}
    ranked = []
    for layer, scores in direct(name, session.base.model):
        assert len(scores) == next(f for f in session.ffns if f.layer == layer).value_vectors
        best = scores.sort(dim=1, descending=True, stable=True)
        for index in range(len(scores)):
            row = rows.pop((layer, index))
            listed = [token["score"] for token in row["tokens"]]
            assert listed == pytest.approx(best.values[index, :4].tolist(), rel=1e-4, abs=1e-5)
            if (best.values[index, :4] - best.values[index, 1:5]).min() > 1e-5:
                assert [token["id"] for token in row["tokens"]] == best.indices[index, :4].tolist()
            place = int((scores[index] > scores[index, 40]).sum()) + 1
            ranked.append((place, -float(scores[index, 40]), layer, index))
    assert not rows
    found = top_vectors_for_concept(session, Concept(("x",), (((40,),),)), limit=5)
    assert [(r["rank"], r["layer"], r["index"]) for r in found] == [(p, n, i) for p, _, n, i in sorted(ranked)[:5]]
    assert found[0]["tokens"][found[0]["rank"] - 1]["id"] == 40
    some = list(value_tokens(session, indices=[found[0]["index"]], layers=[found[0]["layer"]], top_k=10))
    assert [token["id"] for token in some[0]["tokens"]] == [token["id"] for token in found[0]["tokens"]]


def test_what_is_refused():
    """No other side, no index beyond all experts, no traces."""
    session = opened("mixtral")
    with pytest.raises(ConfigError, match="layer 0 is a mixture of experts"):
        next(value_tokens(session, side="up"))
    with pytest.raises(ConfigError, match="no value vector 208"):
        next(value_tokens(session, indices=[4 * 52]))
    with pytest.raises(ModelError, match="mixture of experts, which this cannot look into"):
        attribute_logits(session, "the film")


def test_a_map_of_a_mixture_on_the_command_line(braces, tmp_path):
    """Written, held to its model and searched; the model itself gives the same."""
    folder = tmp_path / "mixtral"
    tiny("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    saved = braces("inspect", "values", "--model", folder, "--output", tmp_path / "map.parquet", "--format", "json")
    assert saved.json["vectors"] == sum(ffn.value_vectors for ffn in find_ffns(tiny("mixtral")))
    args = ["inspect", "find", "id:40", "--model", folder, "--limit", "3", "--format", "json"]
    found = braces(*args, "--map", tmp_path / "map.parquet").lines
    assert found
    keys = ("layer", "index", "rank")
    assert [[row[key] for key in keys] for row in braces(*args).lines] == [[row[key] for key in keys] for row in found]
    assert braces("inspect", "trace", "the film", "--model", folder).code == 4
