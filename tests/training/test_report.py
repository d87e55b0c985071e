"""Size of the side path, stored relevance scales, and metrics."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from braces_cli.core.adapter.files import find_adapter, read_config
from braces_cli.core.adapter.model import attach, attach_stored
from braces_cli.core.adapter.reference import reference
from braces_cli.core.attributes.build import build_attribute
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.errors import ModelError
from braces_cli.core.models.tokenize import Encoded
from braces_cli.training.report import MetricsFile, read_metrics, side_path_shares
from tests.conftest import make_adapter, open_gates, tiny_model
from tests.core.architectures import tiny
from tests.core.comparison import TOKENS, relative

_IDS = torch.randint(3, 96, (6, 12), generator=torch.Generator().manual_seed(4)).tolist()
EXAMPLES = [Encoded(ids[: 5 + row], ids[: 5 + row], False, False) for row, ids in enumerate(_IDS)]


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_side_path_share(name):
    """Compared with the outputs of a model with and without the adapter on one layer."""
    model = tiny(name) if name == "mixtral" else tiny_model(name)
    adapter = attach(model, 4, layers=[1])
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


def test_relevance_scales_are_saved_and_loaded(session, tmp_path):
    """Bit-identical adapter; steering is proportional to the scales; damaged scales are refused."""
    model = session.base.model
    folder = make_adapter(session, tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["relevance_scale"] == [1.5, 0.75]
    stored = find_adapter(str(folder))
    adapter, config = attach_stored(session.base, stored), stored.config
    for (_, adapter_layer), scale in zip(adapter.adapted_ffns, (2.5, 0.25), strict=True):
        adapter_layer.scale = scale
    with torch.no_grad():
        scaled = model(TOKENS).logits
    adapter.save(tmp_path / "b", config, "# test\n")
    adapter.detach()
    assert (
        load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    sizes = []
    for name, same in (("b", True), ("a", False)):
        session.add_adapter(find_adapter(str(tmp_path / name)))
        with torch.no_grad(), reference(session.adapter):
            slow = model(TOKENS).logits
        with torch.no_grad():
            fast = model(TOKENS).logits
        assert torch.equal(fast, scaled) == same
        assert relative(fast, slow) < 1e-5
        with steered(session, [(build_attribute(session, "good", ["good"]), 1.0)]) as found:
            sizes.append([size.share for size in found])
    assert sizes[0] == pytest.approx([2.5 / 1.5 * sizes[1][0], 0.25 / 0.75 * sizes[1][1]], rel=1e-5)
    raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    for damaged in ([], [1.0], [1.0, 0.0], [1.0, None], 2.0):
        (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**raw, "relevance_scale": damaged}))
        with pytest.raises(ModelError, match="`relevance_scale"):
            read_config(tmp_path / "b")


def test_train_reports_the_share_and_stores_the_scales(braces, model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film is good"}\n{"text": "the end is sad"}\n')
    scales = []
    for name in ("auto", "0.5"):
        outcome = braces(
            "train", "--model", model_dir, "--data", rows, "--rank", 4, "--max-steps", 2, "--relevance-scale", name,
            "--output-dir", tmp_path / name, "--format", "json",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert len(outcome.json["side_path_share"]) == 2
        assert min(outcome.json["side_path_share"]) > 0
        scales.append(read_config(tmp_path / name).relevance_scale)
    assert min(scales[0]) > 1
    assert scales[1] == [0.5, 0.5]


def test_metrics_of_an_earlier_attempt_are_dropped(tmp_path):
    """Rows after the step of the checkpoint, and the incomplete line of a killed process."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 9.0}\n{"st')
    metrics = MetricsFile(path, 2)
    metrics.add({"step": 4, "loss": 2.0, "eval_loss": 3.0, "other": 1.0})
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0, "eval_loss": 3.0}]
