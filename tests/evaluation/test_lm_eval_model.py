"""`--model braces` in lm-eval's command line."""

import json
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.registry import get_model

from braces_cli.core.adapter.model import open_session
from braces_cli.core.attributes.hooks import steered
from braces_cli.core.attributes.lookup import find_attribute
from braces_cli.core.options import LoadOptions
from braces_cli.evaluation import lm_eval_model

ROOT = Path(__file__).parents[2]


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 30)[None]).logits


def test_the_entry_point_names_the_class():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    module, _, name = declared["braces"].partition(":")
    assert getattr(import_module(module), name) is lm_eval_model.BracesLM


def test_the_model_has_adapter_and_attribute(tiny_folder, make_adapter):
    adapter = str(make_adapter(tiny_folder))
    lm_eval_model.register()
    lm_eval_model.register()  # a second call has no effect
    text = f"pretrained={tiny_folder},adapter={adapter},attribute=positive,s=3"
    model = get_model("braces").create_from_arg_string(text, {"batch_size": 2, "device": "cpu"})
    session = open_session(str(tiny_folder), adapter, LoadOptions(device="cpu"))
    plain = _logits(session.base.model)
    with steered(session, [(find_attribute(session, "positive", None), 3.0)]):
        expected = _logits(session.base.model)
    assert torch.equal(_logits(model.model), expected)
    assert not torch.equal(expected, plain)
    # `cuda:0` is what lm-eval's command passes by default, also without CUDA.
    for other, device in (("", "cpu"), (",attribute=positive,s=0", "cuda:0")):
        alone = get_model("braces").create_from_arg_string(f"adapter={adapter}{other}", {"device": device})
        assert torch.equal(_logits(alone.model), plain)


@pytest.mark.slow
def test_the_command_line_of_lm_eval_runs_the_model(
    tiny_folder, make_adapter, write_jsonl, tmp_path, monkeypatch, capsys
):
    """As `python -m braces_cli.evaluation.lm_eval_model run --model braces ...`."""
    rows = [{"question": f"Q{i}?", "answer": {"aliases": ["a"]}} for i in range(3)]
    files = dict.fromkeys(("train", "validation"), str(write_jsonl("t.jsonl", rows)))
    source = Path(lm_eval.__file__).parent / "tasks" / "triviaqa" / "default.yaml"
    arguments = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "mine.yaml").write_text(
        f"include: {source}\ntask: mine\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps(arguments)}\n"
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes six seconds
    model_args = f"adapter={make_adapter(tiny_folder)}"
    argv = ["run", "--model", "braces", "--model_args", model_args, "--tasks", str(tmp_path / "mine.yaml")]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *argv, "--device", "cpu", "--limit", "2"])
    lm_eval_model.main()
    assert "|mine" in capsys.readouterr().out.replace(" ", "")
