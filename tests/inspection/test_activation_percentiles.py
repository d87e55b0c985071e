"""A neuron's own percentiles over texts, and clamps that are given as such."""

from __future__ import annotations

import json

import pytest
import torch

from braces_cli.core.errors import DataError
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.tokenize import encode
from braces_cli.inspection.clamp import Clamp, activation_weights, read_texts, resolve_percentiles
from tests.conftest import tiny_model, tiny_tokenizer

TEXTS = ["the film is good", "a happy day in the old town", "the end", *["so it is"] * 8]


class Opened:
    """A session of any architecture, as far as this room looks at it."""

    def __init__(self, name: str) -> None:
        self.base = type("Base", (), {"model": tiny_model(name), "tokenizer": tiny_tokenizer()})()
        self.ffns = find_ffns(self.base.model)
        self.adapter = None


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_weights_and_percentiles_equal_one_text_after_another(name):
    """Padding counts for nothing, neurons of one layer are not mixed up, and a plain value stays as it is."""
    session = Opened(name)
    tokenizer = session.base.tokenizer
    neurons = [(1, 7), (0, 3), (1, 2)]
    texts = [encode(tokenizer, text) for text in TEXTS]
    found = activation_weights(session, neurons, texts)
    expected = []
    for text in texts:
        seen = {}
        handles = [
            f.value.register_forward_pre_hook(
                lambda m, a, layer=f.layer, seen=seen: seen.update({layer: a[0].reshape(-1, 52)})
            )
            for f in session.ffns
        ]
        with torch.no_grad():
            session.base.model(input_ids=torch.tensor([text.ids]))
        for handle in handles:
            handle.remove()
        expected.append(torch.stack([seen[layer][:, index] for layer, index in neurons], dim=1))
    whole = torch.cat(expected)
    assert found.shape == whole.shape
    assert torch.allclose(found.sort(dim=0).values, whole.sort(dim=0).values, atol=1e-5)
    clamps = [Clamp(1, 7, 0.0, 99.0), Clamp(0, 3, 5.0), Clamp(1, 2, 0.0, 0.0), Clamp(0, 4, 0.0, 100.0)]
    settled = resolve_percentiles(session, clamps, texts)
    assert [c.percentile for c in settled] == [99.0, None, 0.0, 100.0]
    assert settled[0].value == pytest.approx(float(whole[:, 0].quantile(0.99)), abs=1e-5)
    assert settled[1] == clamps[1]
    assert settled[2].value == pytest.approx(float(whole[:, 2].min()), abs=1e-5)


def test_weights_of_an_offloaded_base_are_those_of_a_loaded_one(opened_twice):
    """The weights of the model are not on the device where it computes."""
    sessions = opened_twice("llama")
    texts = [encode(sessions[0].base.tokenizer, text) for text in TEXTS]
    plain, offloaded = (activation_weights(session, [(1, 7), (0, 3)], texts) for session in sessions)
    assert torch.allclose(plain, offloaded, atol=1e-6)


def test_the_first_rows_with_a_text(session, tmp_path):
    """Blank rows do not count."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *TEXTS]))
    found = read_texts(session, [str(path)], 2)
    assert [session.base.tokenizer.decode(t.ids, skip_special_tokens=True) for t in found] == TEXTS[:2]
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no row holds a text"):
        read_texts(session, [str(path)])


def test_clamps_at_a_percentile_on_the_command_line(braces, model_dir, tmp_path):
    """The value that it came to stands in the JSON and in the table."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    args = ["inspect", "clamp", "1:3=p90", "0:7=-1", "--model", model_dir, "--prompt", "a day", "--data", path]
    found = braces(*args, "--format", "json").json
    first, second = found["clamps"]
    assert second == {"layer": 0, "index": 7, "value": -1.0}
    assert first["percentile"] == 90.0
    args[2] = f"1:3={first['value']!r}"
    assert braces(*args[:-2], "--format", "json").json["prompts"] == found["prompts"]
    args[2] = "1:3=p90"
    shown = braces(*args)
    assert shown.code == 0
    assert "1:3" in shown.out
    assert f"{first['value']:.3g}"[:4] in shown.out
