"""Settings of a run: what identifies it, what depends on the base, and what does not go together."""

from typing import Any

import pytest

from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError
from braces_cli.training.settings import TrainSettings

# Settings of device, reports, and the division of a step into batches and processes.
FREE = {
    "output_dir", "overwrite", "resume", "device", "device_map", "trust_remote_code", "allow_other_base", "save_steps",
    "save_total_limit", "eval_steps", "logging_steps", "report_to", "push_to_hub", "gradient_checkpointing",
    "batch_size", "gradient_accumulation", "attn_implementation",
}  # fmt: skip


def test_identity_of_a_run() -> None:
    """Every setting that affects the adapter, and the examples of a step."""
    settings = TrainSettings(batch_size=4, gradient_accumulation=3)
    identity = settings.identity(processes=2)
    assert set(settings.resolved()) - set(identity) == FREE
    assert identity["examples_per_step"] == 24


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"lr": 0.02, "gate_lr": 0.3, "rank": 16, "contrast": 0.0, "margin": None, "max_length": 512}),
        ({"attribute_field": "mood"}, {"gate_lr": 0.1, "contrast": 0.1, "margin": 6.0}),
        ({"relevance_to": "output", "attribute_field": "mood"}, {"gate_lr": 0.006}),
        ({"lr": 0.5, "max_length": 100}, {"lr": 0.5, "max_length": 100}),
        ({"method": "lora"}, {"lr": 3e-3, "rank": 16}),
    ],
)
def test_defaults_that_depend_on_the_base_and_on_other_settings(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    resolved = TrainSettings(**given).resolve(64, 512)
    assert {name: getattr(resolved, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"columns": ["attribute=mood"], "attribute_field": "feeling"}, "two columns for `attribute`"),
        ({"opposites": ["a:b"]}, "--opposites: no attributes are trained"),
        ({"strength_field": "much"}, "--strength-field: no attributes are trained"),
        ({"contrast": 0.1}, "--contrast: no attributes are trained"),
        ({"margin": 3}, "--margin: there is no contrastive loss"),
        ({"attribute_field": "mood", "opposites": ["a:b", "b:c"]}, "an attribute is in two pairs"),
        ({"attribute_field": "mood", "opposites": ["positive"]}, "`positive` is not A:B"),
        ({"attribute_field": "mood", "opposites": ["a:a"]}, "`a:a` is not A:B"),
        ({"method": "lora", "attribute_field": "mood"}, "--attribute-field has no effect with --method lora"),
        ({"method": "lora", "attributes": "."}, "--attributes has no effect with --method lora"),
        ({"method": "lora", "gate_lr": 1}, "--gate-lr has no effect with --method lora"),
        ({"method": "lora", "relevance_to": "output"}, "--relevance-to has no effect with --method lora"),
        ({"relevance_to": "both"}, "--relevance-to"),
        ({"lora_alpha": 2}, "--lora-alpha has no effect with --method braces"),
        ({"method": "lora", "adapter": "a"}, "lora cannot continue"),
        ({"method": "loro"}, "--method: `loro` is not one of braces, lora, rslora, dora, pissa or peft:CONFIG.json"),
        ({"method": "peft:a.json", "rank": 4}, "--rank has no effect with --method peft:a.json"),
        ({"method": "peft:a.json", "layers": "1"}, "--layers has no effect"),
        ({"method": "peft:a.json", "lora_targets": "v_proj"}, "--lora-targets has no effect"),
        ({"method": "peft:a.json", "contrast": 1}, "--contrast has no effect"),
        ({"method": "peft:a.json"}, "a.json: no such config"),
        ({"relevance_scale": "much"}, "`much` is not a scale"),
        ({"relevance_scale": 0}, "`0` is not a scale"),
        ({"relevance_scale": "inf"}, "`inf` is not a scale"),
        ({"streaming": True}, "a stream has no known length"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite are mutually exclusive"),
        ({"data": None}, "--data: missing option"),
        ({"output_dir": None}, "--output-dir: missing option"),
    ],
)
def test_settings_that_do_not_fit_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(TrainSettings, {"data": "rows.jsonl", "output_dir": "out", **given})
    assert message in str(error.value)


def test_a_file_may_serve_every_method(tmp_path: Any) -> None:
    """Unused settings in a file are ignored, except attributes."""
    path = tmp_path / "a.yaml"
    path.write_text("gate_lr: 1\nlora_alpha: 4\ndata: rows.jsonl\noutput_dir: out\n")
    for method in ("lora", "braces"):
        assert build(TrainSettings, {"method": method}, path).method == method
    path.write_text("attribute_field: mood\ndata: rows.jsonl\noutput_dir: out\n")
    with pytest.raises(ConfigError, match="--attribute-field has no effect"):
        build(TrainSettings, {"method": "lora"}, path)


def test_recorded_settings() -> None:
    """Opposites as pairs; no settings of other methods, checkpoints or files."""
    recorded = TrainSettings(attribute_field="mood", opposites=("a:b",), data=("rows.jsonl",)).recorded()
    assert recorded["opposites"] == [["a", "b"]]
    assert {"lora_alpha", "save_steps", "data", "given", "model"}.isdisjoint(recorded)
    assert "contrast" not in TrainSettings(method="lora").recorded()
