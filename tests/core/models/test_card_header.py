"""The header of a model card is what the hub's own reader reads."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from braces_cli.core.models.hub import card_header, embedded_name, known_license

FIXED = {"name": "LLMBraces adapter", "library": "braces", "relation": "adapter", "tags": ("llmbraces", "adapter")}


def header(base, **details):
    return ModelCard(card_header(base, **FIXED, **details) + "\n\n# Title\n").data


def test_the_fields_that_the_hub_knows():
    read = header("owner/base", metrics={"perplexity": 12.5, "loss": 2.526}, datasets=["/somewhere/dev.jsonl"])
    assert read.base_model == "owner/base"
    assert read.base_model_relation == "adapter"
    assert read.library_name == "braces"
    assert read.pipeline_tag == "text-generation"
    assert read.tags == ["llmbraces", "adapter"]
    assert read.model_name == "LLMBraces adapter"
    assert [(one.metric_type, one.metric_value, one.dataset_name) for one in read.eval_results] == [
        ("perplexity", 12.5, "dev.jsonl"),
        ("loss", 2.526, "dev.jsonl"),
    ]


@pytest.mark.parametrize("base", ["/disk/model", "./model", "~/model", "embedded@1", "C:/models/x"])
def test_a_base_that_is_not_on_the_hub_is_not_linked(base):
    read = header(base)
    assert read.base_model is None
    assert "base_model_relation" not in read.to_dict()
    assert "model-index" not in read.to_dict()


def test_a_folder_with_the_form_of_a_hub_id_is_not_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert header("models/mine").base_model is None


def test_the_licence_is_that_of_the_base_where_it_is_known(tmp_path):
    assert known_license(embedded_name()) == "apache-2.0"
    assert known_license("owner/base") is None
    assert known_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# x\n")
    assert header(str(tmp_path)).license == "mit"


@pytest.mark.parametrize(
    "text", ["no header", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: [a, b]\n---\n"]
)
def test_a_broken_card_of_the_base_gives_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert known_license(str(tmp_path)) is None
