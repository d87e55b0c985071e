"""Code of a model runs with --trust-remote-code only, whatever standard input contains; nothing is unpickled."""

import ast
import io
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.conftest import tiny_model

PACKAGE = Path(__file__).parents[1] / "braces_cli"
# Functions of transformers, datasets and lm-eval with an argument `trust_remote_code`.
LOADERS = {"from_pretrained", "from_config", "load_dataset", "pipeline", "simple_evaluate"}
PROCESSES = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}


def unsafe_calls(source: str) -> tuple[int, list[str]]:
    """Count loads and processes; list those without `trust_remote_code`, where transformers asks, and with stdin."""
    count, found = 0, []
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    # Subclasses of lm-eval's HFLM pass the argument to its constructor.
    inside = {id(node) for each in classes if "HFLM" in map(ast.unparse, each.bases) for node in ast.walk(each)}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        # PEFT loads onto an open model and has no such argument.
        loads = name.rpartition(".")[2] in LOADERS and not name.startswith("PeftModel.")
        loads |= name == "super().__init__" and id(node) in inside
        count += loads or name in PROCESSES
        if (loads and "trust_remote_code" not in words) or (
            name in PROCESSES and words.get("stdin") != "subprocess.DEVNULL"
        ):
            found.append(name)
    return count, found


def test_every_load_sets_trust_remote_code() -> None:
    """In every module; and no child process can read the standard input."""
    found = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: calls for name, (_, calls) in found.items() if calls} == {}
    assert sum(count for count, _ in found.values()) >= 10
    loads = "AutoTokenizer.from_pretrained(name)\nload_dataset(x, trust_remote_code=False)\nsubprocess.run(['a'])"
    assert unsafe_calls(loads) == (3, ["AutoTokenizer.from_pretrained", "subprocess.run"])
    model = "class Model(HFLM):\n    def __init__(self):\n        super().__init__(x)"
    assert unsafe_calls(model) == (1, ["super().__init__"])


@pytest.fixture
def hostile(model_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model with its config, tokenizer and classes in a Python file that writes a mark; and the path of the mark."""
    folder, mark = tmp_path / "hostile", tmp_path / "mark"
    shutil.copytree(model_dir, folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": "evil", "auto_map": dict.fromkeys(kinds, "evil.Evil")},
        "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    for name, change in changes.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder, mark


def commands(folder: Path, tmp_path: Path) -> dict[str, list[Any]]:
    """One call of each command that opens a model."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film"}\n')
    out = ["--output-dir", tmp_path / "out"]
    return {
        "train": ["train", "--model", folder, "--data", rows, *out],
        "eval": ["eval", "--model", folder, "--tasks", "perplexity", "--task-data", f"perplexity={rows}", *out],
        "attr-build": ["attr-build", "--model", folder, "--attribute", "warm", "--words", "warm", *out],
        "steer": ["steer", "--model", folder, "--prompt", "a"],
        "inspect": ["inspect", "values", "--model", folder],
        "slots": ["export", "slots", "--model", folder, *out],
    }


@pytest.mark.parametrize("name", ["train", "eval", "attr-build", "steer", "inspect", "slots"])
def test_code_of_a_model_is_not_run(braces: Any, hostile: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Exit code 4 and the name of the option, although standard input answers yes to everything."""
    folder, mark = hostile
    outcome = braces(*commands(folder, tmp_path)[name], stdin="y\n" * 50)
    assert (outcome.code, mark.exists()) == (4, False), outcome.err
    assert "--trust-remote-code" in outcome.err


def test_trust_remote_code_runs_it(braces: Any, hostile: tuple[Path, Path], tmp_path: Path) -> None:
    """Control of the test above."""
    folder, mark = hostile
    braces(*commands(folder, tmp_path)["steer"], "--trust-remote-code")
    assert mark.exists()


def test_code_of_a_classifier_is_not_run(hostile: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--scorer FOLDER`, where no option allows it."""
    from braces_cli.core.errors import ModelError
    from braces_cli.scoring.scorers import scorer

    folder, mark = hostile
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    with pytest.raises(ModelError, match="needs code from its repository"):
        scorer(str(folder))
    assert not mark.exists()


def test_verification_runs_no_code(hostile: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`merge --check FOLDER`, for the model and, if that loads, for its tokenizer."""
    from braces_cli.export.verify_process import probe

    folder, mark = hostile
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    question, config = tmp_path / "question.json", folder / "config.json"
    question.write_text(
        json.dumps({"texts": ["a"], "ids": [[1]], "device": "cpu", "dtype": "auto", "code": False, "loras": []})
    )
    for change in ({}, {"model_type": "llama", "auto_map": {}}):
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(ValueError, match="trust_remote_code"):
            probe(str(folder), str(question), str(tmp_path / "answer"))
    assert not mark.exists()


class Payload:
    """A call in a pickle, made when the pickle is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def test_nothing_is_unpickled(braces: Any, model_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Pickled weights of a model or a PEFT adapter are an error; other pickles in a folder are not read."""
    mark, model, adapter = tmp_path / "mark", tmp_path / "pickled", tmp_path / "peft"
    shutil.copytree(model_dir, model)
    (model / "model.safetensors").unlink()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4}')
    for path in (model / "pytorch_model.bin", adapter / "adapter_model.bin", adapter_dir / "optimizer.pt"):
        torch.save({"weight": Payload(mark)}, path)
    assert braces("steer", "--model", model, "--prompt", "a").code == 4
    assert braces(*commands(model_dir, tmp_path)["eval"], "--adapter", adapter).code == 4
    assert braces("inspect", "--adapter", adapter_dir).code == 0
    assert not mark.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # control


def test_a_module_that_an_adapter_names_is_not_imported(braces, model_dir, tmp_path, monkeypatch):
    """`megatron_core` of a config of peft: in an adapter that is evaluated, and in a config of `--method peft:`."""
    mark, adapter = tmp_path / "mark", tmp_path / "peft"
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    wrapped.save_pretrained(adapter)
    file = adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), "megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}
    file.write_text(json.dumps(config))
    ran = commands(model_dir, tmp_path)
    assert braces(*ran["eval"], "--adapter", adapter).code == 4
    assert braces(*ran["train"], "--method", f"peft:{file}").code == 2
    assert not mark.exists()
    with pytest.raises(AttributeError):
        peft.PeftModel.from_pretrained(tiny_model(), str(adapter))
    assert mark.exists()  # control


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Host names that are looked up, with the hub enabled; each look-up fails."""
    looked_up: list[Any] = []

    def look_up(host: Any, *more: Any, **options: Any) -> Any:
        looked_up.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no network in a test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return looked_up


@pytest.mark.parametrize("name", ["train", "eval", "attr-build", "steer", "inspect"])
def test_local_models_need_no_network(braces, model_dir, tmp_path, connections, name):
    """Commands on folders and files make no connection."""
    more = {"train": ["--max-steps", 1, "--rank", 2], "eval": ["--limit", 1], "steer": ["--max-new-tokens", 2]}
    outcome = braces(*commands(model_dir, tmp_path)[name], *more.get(name, ()), "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert connections == []


def test_hub_id_needs_the_network(braces: Any, connections: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above."""
    # The hub's client repeats its request for most of a minute.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert braces("steer", "--model", "owner/name", "--prompt", "a").code == 4
    assert connections
