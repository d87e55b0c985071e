"""One run of each benchmark, study and check in `recipes`, at tiny sizes, in this process to save time."""

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from tests.core.models.test_chat import TEMPLATES

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
BENCHMARKS = {
    "activations": {"saved_vs_calculated"},
    "training": {"train_step_vs_lora", "train_step_vs_floor", "padding_share", "packed_vs_padded"},
    "forward": {"attached_vs_bare", "attached_vs_bare_decode", "merged_vs_bare", "merged_vs_bare_decode"},
    "end_to_end": {"train_vs_lora, model, texts", "eval_vs_lm_eval", "adapters_vs_runs", "steer_vs_generate"},
    "scaling --no-memory": {"step_vs_lora, layers 2", "step_vs_floor, layers 2"},
    "startup": {"help_vs_import", "check_vs_tokenizer", "dry_run_vs_tokenizer"},
    "inspection": {"map_vs_gemm", "map_vs_loop", "map_vs_gemm_bfloat16", "map_vs_loop_bfloat16"},
    "steering": {"steered_vs_unsteered", "steered_vs_control_vector", "mixed_vs_uniform"},
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Import a recipe by its path without suffix, and set the command line that its `main` reads."""
    before = set(sys.modules)

    def load(path: str, *args: object) -> Any:
        file = RECIPES / f"{path}.py"
        monkeypatch.syspath_prepend(str(file.parent))
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, args)])
        return importlib.import_module(file.stem)

    yield load
    # `training` and `steering` are names of several recipes.
    for name in set(sys.modules) - before:
        if str(RECIPES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def in_process(programs: Any, name: str, argv: list[object]) -> Callable[[], float]:
    """Run a Python program of `end_to_end.py` in this process."""
    words = [str(word) for word in argv[1:]]

    def measure() -> float:
        is_module = words[0] == "-m"
        with redirect_stdout(StringIO()) as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[is_module:])
            try:
                (runpy.run_module if is_module else runpy.run_path)(words[is_module], run_name="__main__")
            except SystemExit as ended:
                if ended.code:
                    pytest.fail(f"{name}: exit code {ended.code}")
        programs.output[name] = out.getvalue()
        programs.peaks.setdefault(name, []).append(1.0)
        return 1.0

    return measure


@pytest.mark.parametrize("words", sorted(BENCHMARKS))
def test_benchmark(recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any, words: str) -> None:
    name, *more = words.split()
    benchmark = recipe(f"bench/{name}", "--quick", *more)
    if name == "end_to_end":
        monkeypatch.setattr(benchmark.Programs, "measurement", in_process)
    benchmark.main()
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(printed)
    assert list(found) == ["machine", "settings", "ratios"]
    assert found["ratios"].keys() >= BENCHMARKS[words]
    for ratio in found["ratios"].values():
        low, high = ratio["spread"]
        assert 0 <= low <= ratio["value"] <= high
    if name == "activations":
        assert found["ratios"]["saved_vs_calculated"]["value"] == 1
    # The document can be published: it contains no path of this machine.
    assert str(RECIPES.parent) not in printed
    assert sys.prefix not in printed


def test_study_of_steering(recipe: Any, model_dir: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in (("good film", "positive"), ("sad end", "negative"))] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film is"}\n')
    out, plot = tmp_path / "runs.jsonl", tmp_path / "curves.png"
    args = ["--model", model_dir, "--scorer", f"fit:{tmp_path / 'rows.jsonl'}", "--prompts", tmp_path / "prompts.jsonl"]
    methods = ["--method", "braces=0,1", "--method", "pca_diff=1", "--method", "difference=1"]
    sizes = ["--samples", 1, "--tokens", 2, "--out", out, "--plot", plot]
    recipe("studies/steering", *args, *methods, *sizes).main()
    assert [json.loads(line)["s"] for line in out.read_text().splitlines()] == [0, 1, 1, 1]
    assert plot.stat().st_size > 1000


def test_study_of_the_comparison(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "commonsense" / "boolq").mkdir(parents=True)
    rows = [{"instruction": f"question: is {k} odd?\n", "answer": ("false", "true")[k % 2]} for k in range(12)]
    for name in ("train", "test"):
        file = tmp_path / "commonsense" / "boolq" / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "runs.jsonl"
    args = ["--quick", "--part", "comparison", "--tasks", "boolq", "chats", "--data", tmp_path, "--out", out]
    recipe("studies/comparison", *args, "--systems", "braces-input-16", "lora-qv-16").main()
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    parts = [(run["task"], run["part"]) for run in runs]
    assert parts == [(task, part) for task in ("boolq", "chats") for part in ("base", *(["tune"] * 3 + ["report"]) * 2)]
    assert runs[0]["chance"] == runs[0]["majority"] == 0.5
    capsys.readouterr()
    recipe("studies/comparison", "--out", out, "--table").main()
    assert capsys.readouterr().out.count("LoRA r 16 (q, v)") == 2


def test_gpu_check_on_the_cpu(braces: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands."""
    monkeypatch.syspath_prepend(str(RECIPES / "bench"))
    out = tmp_path / "check.json"
    check = recipe("gpu/check", "--device", "cpu", "--part", "commands", "--output", out, "--work", tmp_path)

    def run(argv: list[Any]) -> dict[str, Any]:
        outcome = braces(*argv[2:])
        return {"exit_code": outcome.code, "out": outcome.out, "error": outcome.err}

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(SystemExit) as ended:
        check.main()
    found = json.loads(out.read_text())
    assert (ended.value.code, found["failed"]) == (0, []), found
    assert json.loads(found["parts"]["train, tiny"]["out"])["steps"] == 2


def test_chat_templates(recipe: Callable[..., Any], tmp_path: Path, embedded: Path, capsys: Any) -> None:
    """A template with the marks of its training template, and one that drops tools."""
    (tmp_path / "a.jinja").write_text(TEMPLATES["prefixes"])
    (tmp_path / "a_training.jinja").write_text(TEMPLATES["marks"])
    recipe("studies/chat_templates", "--trl", tmp_path, "--tokenizer", embedded).main()
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.count("equal (") == 2
    assert row.count("refused: tool `lookup_weather`") == 2
