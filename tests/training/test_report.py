"""Size of the side path, stored relevance scales, and metrics."""

from __future__ import annotations

import pytest
import torch

from braces_cli.core.adapter.files import read_config
from braces_cli.core.adapter.model import attach
from braces_cli.core.models.tokenize import Encoded
from braces_cli.training.report import side_path_shares
from tests.conftest import open_gates, tiny_model
from tests.core.architectures import tiny

_IDS = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(4)).tolist()
EXAMPLES = [Encoded(ids[: 5 + row], ids[: 5 + row], False, False) for row, ids in enumerate(_IDS)]


@pytest.mark.parametrize("relevance", ["input", "output"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_side_path_share(name, relevance):
    """Compared with the outputs of a model with and without the adapter on one layer."""
    model = tiny(name) if name == "mixtral" else tiny_model(name)
    adapter = attach(model, 4, layers=[1], relevance_to=relevance)
    open_gates(adapter)
    ffn, adapter_layer = adapter.adapted_ffns[0]
    outputs: list[torch.Tensor] = []
    end = ffn.host if name != "opt" else ffn.value
    with torch.no_grad():
        for enabled in (True, False):
            adapter_layer.enabled = enabled
            # Runs after the hook of the adapter.
            handle = end.register_forward_hook(lambda module, args, output: outputs.append(output))
            for example in EXAMPLES:
                model(input_ids=torch.tensor([example.ids]))
            handle.remove()
    adapter_layer.enabled = True
    on, off = (torch.cat([o.reshape(-1, o.shape[-1]) for o in part]) for part in (outputs[:6], outputs[6:]))
    expected = float(((on - off).norm(dim=-1) / off.norm(dim=-1)).median())
    assert side_path_shares(adapter, EXAMPLES) == [pytest.approx(expected, rel=1e-3)]
    assert adapter_layer.enabled  # the measurement leaves no trace


def test_train_reports_the_share_and_stores_the_scales(train, tmp_path):
    scales = []
    for name in ("auto", "0.5"):
        outcome = train(tmp_path / name, "--max-steps", 2, "--relevance-scale", name)
        assert outcome.code == 0, outcome.err
        assert len(outcome.json["side_path_share"]) == 2
        assert min(outcome.json["side_path_share"]) > 0
        scales.append(read_config(tmp_path / name).relevance_scale)
    assert min(scales[0]) > 1
    assert scales[1] == [0.5, 0.5]
