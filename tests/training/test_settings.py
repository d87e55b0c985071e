"""Settings of a run: which of them identify it, and what only one method reads."""

from __future__ import annotations

import pytest

from braces_cli.core.errors import ConfigError
from braces_cli.training.settings import RunSettings, TrainSettings

# Where a run is computed, how often it reports, and how a step is divided into batches and processes.
FREE = {
    "output_dir", "overwrite", "resume", "device", "device_map", "trust_remote_code", "save_steps", "save_total_limit",
    "eval_steps", "logging_steps", "report_to", "push_to_hub", "gradient_checkpointing", "batch_size",
    "gradient_accumulation",
}  # fmt: skip


def test_what_identifies_a_run():
    """Every setting but those without an effect on the adapter, and the examples of a step."""
    settings = RunSettings(batch_size=4, gradient_accumulation=3)
    identity = settings.identity(processes=2)
    assert set(settings.resolved()) - set(identity) == FREE
    assert identity["examples_per_step"] == 24


def test_defaults_that_depend_on_other_settings():
    """Rates follow attributes, method and width; what is given stays."""
    plain, conditioned = TrainSettings(), TrainSettings(attribute_field="mood")
    assert (plain.gate_lr, plain.rank, plain.contrast, plain.margin) == (0.3, 16, 0.0, None)
    assert (conditioned.gate_lr, conditioned.contrast, conditioned.margin) == (0.1, 0.1, 6.0)
    assert (plain.lr, plain.for_base(64).lr, TrainSettings(lr=0.5).for_base(64).lr) == (None, 0.02, 0.5)
    assert (TrainSettings(method="lora").lr, TrainSettings(method="lora").rank) == (1e-3, 16)


def test_a_relevance_scale_is_auto_or_a_positive_number():
    """As a number it is the same however it is written."""
    assert TrainSettings().scale is None
    assert [TrainSettings(relevance_scale=text).scale for text in ("1", "1.0", "0.25", 2)] == [1.0, 1.0, 0.25, 2.0]
    assert TrainSettings(relevance_scale="1.0") == TrainSettings(relevance_scale="1")
    for wrong in ("0", "-1", "inf", "nan", "big", ""):
        with pytest.raises(ConfigError, match="is not a scale"):
            TrainSettings(relevance_scale=wrong)


def test_columns_name_attribute_and_strength():
    """As --attribute-field and --strength-field do; two different columns for one key are refused."""
    settings = RunSettings(columns=("attribute=mood,strength=much",))
    assert (settings.attribute_field, settings.strength_field) == ("mood", "much")
    with pytest.raises(ConfigError, match="two columns for `attribute`"):
        RunSettings(columns=("attribute=mood",), attribute_field="feeling")


def test_an_adapter_records_what_its_method_reads():
    """Opposites as pairs; no settings of other methods, of checkpoints or of files."""
    recorded = RunSettings(attribute_field="mood", opposites=("a:b",), data=("rows.jsonl",)).recorded()
    assert recorded["opposites"] == [["a", "b"]]
    assert {"lora_alpha", "save_steps", "data", "given"}.isdisjoint(recorded)
    assert "contrast" not in TrainSettings(method="lora").recorded()
