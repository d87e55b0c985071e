"""What of lm-eval is used that its documentation does not promise: this fails on the day that one of it goes."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import lm_eval
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import braces_cli
from braces_cli.core.distributed import Processes
from braces_cli.core.models.load import load_base
from braces_cli.core.options import LoadOptions
from braces_cli.core.progress import silent
from braces_cli.evaluation.catalog import LM_EVAL_FOLDER
from braces_cli.evaluation.lm_eval_runner import Model


def _model(folder: Path, processes: Processes) -> Model:
    base = load_base(str(folder), LoadOptions(device="cpu"))
    return Model(base.model, base.tokenizer, 2, silent, processes)


def test_attributes_of_its_model_that_are_read_or_set(tiny_folder):
    model = _model(tiny_folder, Processes())
    assert model.batch_size_per_gpu == 2
    assert model.batch_sizes == {}
    assert hasattr(model, "max_batch_size")
    source = inspect.getsource(HFLM)
    for name in ("batch_size_per_gpu", "batch_sizes", "max_batch_size", "accelerator"):
        assert f"self.{name}" in source, name


def test_its_model_takes_rank_and_size_from_us(tiny_folder):
    """lm-eval reads both as properties; its own fields behind them are never touched."""
    model = _model(tiny_folder, Processes(1, 3, accelerator="accelerate"))
    assert (model.rank, model.world_size, model.accelerator) == (1, 3, "accelerate")
    for name in ("rank", "world_size"):
        assert isinstance(inspect.getattr_static(HFLM, name), property)
    for line in inspect.getsource(HFLM).splitlines():
        # Read directly, they would go past us.
        assert not re.search(r"self\._(rank|world_size)(?! = )", line) or "return" in line, line


def test_entries_of_its_index_and_methods_of_its_tasks():
    manager = TaskManager(include_path=[LM_EVAL_FOLDER / "triviaqa"], include_defaults=False)
    entry = manager.task_index["triviaqa"]
    assert entry.kind.name == "TASK"
    assert Path(entry.yaml_path).is_file()
    assert entry.cfg["task"] == "triviaqa"
    assert hasattr(entry, "tags")
    kind = lm_eval.api.task.ConfigurableTask
    names = ("eval_docs", "doc_iterator", "doc_to_text", "doc_to_target", "doc_to_choice")
    for name in (*names, "get_config", "set_config", "set_fewshot_seed", "aggregation"):
        assert hasattr(kind, name), name


def test_what_its_own_command_line_is_started_with():
    assert callable(cli_evaluate)
    assert {"alias", "target"} & set(inspect.signature(model_registry.register).parameters)


def test_no_private_name_of_it_stands_anywhere_else():
    """Names of the form `lm_eval..._name` and HFLM's private fields, over the whole package."""
    private = re.compile(r"\blm_eval[\w.]*\._[a-z]|from lm_eval[\w.]* import (?:.*, )?_|\._(?:rank|world_size)\b")
    files = list(Path(braces_cli.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    assert [str(file) for file in files if private.search(file.read_text(encoding="utf-8"))] == []
