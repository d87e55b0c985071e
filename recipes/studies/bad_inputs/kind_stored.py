"""Bad inputs: what commands have written and read again: runs and checkpoints, merges, evaluations, texts, scorers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutate import (
    HOSTILE,
    Context,
    break_file,
    break_tensors,
    case,
    change_json,
    edit_tensors,
    pickled,
    wrong_values,
)
from sandbox import CANARY, Case


def _train(c: Context, out: Any) -> list[Any]:
    return [
        *(
            "train",
            "--model",
            c.good.model,
            "--device",
            "cpu",
            "--data",
            c.good.rows,
            "--max-steps",
            "4",
            "--rank",
            "4",
        ),
        *("--save-steps", "2", "--output-dir", out, "--resume"),
    ]


def runs(c: Context) -> Case:
    """A stored training run, finished or with a checkpoint, of which one thing is wrong; it is resumed."""
    folder = c.copy(c.good.run, "run")
    finished = c.rng.random() < 0.25
    if not finished:
        # As after a kill behind the second step.
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "run.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoint-4")
    args = _train(c, c.pick(["run", folder]))
    ways: list[Callable[[Context, Path], tuple[Any, str, dict[str, Any]]]]
    ways = [_record] if finished else [_record, _record, _json_file, _json_file, _tensor_file, _tensor_file, _folders,
                                       _folders, _flipped, _pickles]  # fmt: skip
    codes, what, more = c.pick(ways)(c, folder)
    return case(args, codes, f"{'finished' if finished else 'checkpoint'}: {what}", outputs=("run",), **more)


def _record(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """`run.json`, of the run or of the checkpoint."""
    path = next(iter(sorted(folder.glob("run.json")) or sorted(folder.glob("checkpoint-*/run.json"))))
    if c.rng.random() < 0.4:
        what, more = break_file(c, path)
        # A dangling link is as good as nothing there.
        return (0, 2, 4) if what == "a dangling link" else 4, f"run.json {what}", more
    value = json.loads(path.read_text())
    if c.rng.random() < 0.6:
        key = c.pick(sorted(value))
        new = c.pick([new for new in wrong_values(value[key]) if new is not None])
        path.write_text(json.dumps({**value, key: new}))
        strict = key in ("settings", "command", "data", "progress") and not isinstance(value[key], type(new))
        return 4 if strict else (0, 2, 4), f"run.json {key} = {json.dumps(new)[:20]}", {}
    value, what = change_json(c, value)
    path.write_text(json.dumps(value))
    return (0, 2, 4), f"run.json {what}", {}


def _json_file(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    checkpoint = folder / "checkpoint-2"
    path = c.pick([path for path in sorted(checkpoint.glob("*.json")) if path.name != "run.json"])
    if c.rng.random() < 0.4:
        what, more = break_file(c, path)
        return 4, f"{path.name} {what}", more
    value, what = change_json(c, json.loads(path.read_text()), depth=3)
    path.write_text(json.dumps(value))
    return (0, 4), f"{path.name} {what}", {}


def _tensor_file(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    path = c.pick(sorted((folder / "checkpoint-2").glob("*.safetensors")))
    if c.rng.random() < 0.5:
        what, more = break_tensors(c, path)
    else:
        what, more = c.pick(["nan", "inf", "shape", "dtype", "missing", "extra", "zeros"]), {}
        edit_tensors(c, path, what)
    # The adapter of a checkpoint is there to be used; going on needs the others only.
    # Moments may be zero already.
    unread = path.name == "adapter_model.safetensors" or what == "zeros"
    return (0, 4) if unread else 4, f"{path.name} {what}", more


def _folders(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """Folders that are no checkpoints, beside the one that is: it is gone on from, or the error says why not."""
    way = c.pick(["empty newest", "huge step", "file", "link", "half", "swapped", "no digits", "other letters",
                  "removed", "renamed"])  # fmt: skip
    checkpoint = folder / "checkpoint-2"
    if way == "empty newest":
        (folder / "checkpoint-9").mkdir()
    elif way == "huge step":
        checkpoint.rename(folder / f"checkpoint-{'9' * c.pick([6, 30, 200])}")
    elif way == "file":
        (folder / "checkpoint-3").write_text("x")
    elif way == "link":
        (folder / "checkpoint-3").symlink_to("checkpoint-3")
    elif way == "half":
        shutil.copytree(checkpoint, folder / "checkpoint-3")
        for path in c.rng.sample(sorted((folder / "checkpoint-3").iterdir()), 3):
            path.unlink()
    elif way == "swapped":
        other = c.good.run / "checkpoint-4"
        path = c.pick(sorted(checkpoint.glob("*.safetensors")) + sorted(checkpoint.glob("o*.json")))
        shutil.copy2(other / path.name, path)
        return (0, 4) if path.name.startswith("adapter") else 4, f"swapped {path.name}", {}
    elif way == "no digits":
        checkpoint.rename(folder / "checkpoint-x")
    elif way == "other letters":
        (folder / "checkpoint-٣").mkdir()
    elif way == "removed":
        path = c.pick(sorted(checkpoint.iterdir()))
        path.unlink()
        return (0, 4), f"removed {path.name}", {}
    else:
        checkpoint.rename(folder / "checkpoint-3")
        return (0, 4), "renamed to another step", {}
    return (0, 4), way, {}


def _flipped(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """One bit of the state of a checkpoint: nothing but a hash can tell."""
    names = ("parameters.safetensors", "optimizer.safetensors", "rng.json", "optimizer.json")
    path = folder / "checkpoint-2" / c.pick([name for name in names if (folder / "checkpoint-2" / name).exists()])
    content = bytearray(path.read_bytes())
    content[-c.rng.randrange(1, len(content) // 2)] ^= 1 << c.rng.randrange(8)
    path.write_bytes(bytes(content))
    return 4, f"a bit of {path.name}", {}


def _pickles(c: Context, folder: Path) -> tuple[Any, str, dict[str, Any]]:
    name = c.pick(["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"])
    (folder / "checkpoint-2" / name).write_bytes(pickled())
    return (0, 4), "a pickle beside", {}


def _own_code(c: Context) -> str:
    """Code of a checkpoint, which must never run."""
    return f"import os\nos.makedirs({str(c.folder / CANARY)!r}, exist_ok=True)\nclass Own:\n    pass\nOwnConfig = Own\n"


def merges(c: Context) -> Case:
    """A merged folder of which the record, or a file, is wrong; it is checked again."""
    folder = c.copy(c.good.merged, "merged")
    args = ["merge", "--check", c.pick(["merged", folder]), "--device", "cpu"]
    path = folder / "braces_merge.json"
    value = json.loads(path.read_text())
    way = c.pick(["file", "value", "value", "config", "code", "folder"])
    more: dict[str, Any] = {}
    if way == "file":
        what, more = break_file(c, path)
        return case(args, 4, f"record {what}", **more)
    if way == "value":
        keys = ("adapter", "model", "dtype", "attributes", "layers")
        key = c.pick(keys)
        bad: dict[str, tuple[Any, ...]] = {
            "adapter": (5, [], {}, "nothing", "/", True, HOSTILE[0], "a\x00b", "x" * 5000),
            "model": (5, [], {}, "nothing/at/all", True, HOSTILE[6], "a\x00b"),
            "dtype": (5, [], "int7", None, {}),
            "attributes": (5, [], "x", {"positive": "x"}, {"positive": None}, {"no such": 1}, {"../x": 1}, [["a", 1]],
                           {"positive": 1e999}),
            "layers": (5, "9-1", {}, [], "x", True),
        }  # fmt: skip
        new = c.pick(bad[key])
        path.write_text(json.dumps({**value, key: new}))
        # An unknown name is an option's fault wherever it stands; `layers` without attributes says nothing.
        return case(args, (2, 4), f"record {key} = {json.dumps(new)[:30]}")
    if way == "config":
        what, more = break_file(c, folder / "config.json")
        return case(args, 4, f"config.json {what}", **more)
    if way == "code":
        (folder / "modeling_own.py").write_text(_own_code(c))
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig",
                                                    "AutoModelForCausalLM": "modeling_own.Own"}}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return case(args, 4, "code of its own", stdin=b"y\n" * 20)
    name = c.pick(["nothing", c.good.rows, c.good.adapter, "a" * 300, "."])
    return case(["merge", "--check", name], 4, "no merged folder")


def stores(c: Context) -> Case:
    """A stored evaluation, or texts, of which one file is wrong; it is resumed."""
    if c.rng.random() < 0.35:
        return _texts(c)
    folder = c.copy(c.good.evaluated, "evaluated")
    adapter = c.copy(c.good.run, "run")
    args = [
        *("eval", "--model", c.good.model, "--device", "cpu", "--tasks", "perplexity", "--adapter", adapter.name),
        *("--task-data", f"perplexity={c.good.rows}", "--output-dir", "evaluated", "--resume"),
        *c.pick([[], ["--format", "json"]]),
    ]
    name = c.pick(["run.json", "results.json", "parts/base/perplexity.json", "parts/run/perplexity.json"])
    if name.startswith("parts"):
        (folder / "results.json").unlink()
    path = folder / name
    if not path.exists():
        path = c.pick(sorted(folder.rglob("*.json")))
    if c.rng.random() < 0.4:
        what, more = break_file(c, path)
        # A file that is not there was never written.
        codes: Any = (0, 2, 3, 4) if what in ("a dangling link", "a symlink loop", "a FIFO", "a folder") else (2, 3, 4)
        return case(args, codes, f"{name} {what}", outputs=("evaluated",), **more)
    value, what = change_json(c, json.loads(path.read_text()), depth=4)
    path.write_text(json.dumps(value))
    return case(args, (0, 2, 3, 4), f"{name} {what}", outputs=("evaluated",))


def _texts(c: Context) -> Case:
    texts = c.copy(c.good.texts)
    settings = c.copy(c.good.folder / "texts.jsonl.settings.json")
    args = [
        *("steer", "--model", c.good.model, "--device", "cpu", "--prompts", c.good.prompts, "--max-new-tokens", "4"),
        *("--attribute", "positive", "--output", texts.name, "--resume"),
    ]
    path = c.pick([texts, settings])
    # A link that leads nowhere is written through.
    outputs = (texts.name, settings.name, "nowhere")
    if c.rng.random() < 0.5:
        what, more = break_file(c, path)
        empty = what in ("empty", "a dangling link", "a truncated file", "only white space", "a FIFO")
        # A last line without its end is one that was cut off.
        empty = empty or (path == texts and b"\n" not in (path.read_bytes() if path.is_file() else b""))
        codes: Any = (0, 2, 3, 4) if empty else (2, 3, 4)
        return case(args, codes, f"{path.name} {what}", outputs=outputs, **more)
    if path == settings:
        value, what = change_json(c, json.loads(path.read_text()), depth=2)
        path.write_text(json.dumps(value))
        return case(args, (0, 2, 3, 4), f"{path.name} {what}", outputs=outputs)
    lines = path.read_text().splitlines()
    place = c.rng.randrange(len(lines))
    row, what = change_json(c, json.loads(lines[place]), depth=2)
    lines[place] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    return case(args, (0, 2, 3), f"{path.name} {what}", outputs=outputs)


def scorers(c: Context) -> Case:
    """A fitted scorer, or a classifier of transformers, of which one thing is wrong."""
    fitted = c.rng.random() < 0.6
    folder = c.copy(c.good.scorer if fitted else c.good.classifier, "scorer")
    model = ["--model", c.good.model, "--device", "cpu", "--attribute", "positive", "--max-new-tokens", "2"]
    args = c.pick([
        ["steer", *model, "--prompt", "the film", "--sweep", "0:1:1", "--scorer", "scorer"],
        ["eval", *model, "--tasks", "sentiment", "--task-data", f"sentiment={c.good.prompts}", "--scorer",
         f"sentiment={folder}"],
    ])  # fmt: skip
    path = c.pick(sorted(folder.iterdir()))
    if not fitted and c.rng.random() < 0.25:
        (folder / "modeling_own.py").write_text(_own_code(c))
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig",
                   "AutoModelForSequenceClassification": "modeling_own.Own"}}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return case(args, 4, "classifier: code of its own", stdin=b"y\n" * 20)
    kind = "fitted" if fitted else "classifier"
    if path.suffix == ".safetensors":
        if c.rng.random() < 0.5:
            what, more = break_tensors(c, path)
            return case(args, 4, f"{kind} {path.name} {what}", **more)
        what = c.pick(["nan", "inf", "shape", "dtype", "missing"])
        edit_tensors(c, path, what)
        # Integers may be read as numbers.
        odd = what == "dtype" or (not fitted and what in ("nan", "inf"))
        return case(args, (0, 1, 3, 4) if odd else 4, f"{kind} {path.name} {what}")
    if c.rng.random() < 0.5:
        what, more = break_file(c, path)
        unread = path.name in ("tokenizer_config.json", "generation_config.json")
        gone = what in ("a dangling link", "a folder", "a symlink loop", "a FIFO")
        codes: Any = (0, 4) if unread else (2, 4) if gone else 4
        return case(args, codes, f"{kind} {path.name} {what}", **more)
    value, what = change_json(c, json.loads(path.read_text()), depth=2)
    path.write_text(json.dumps(value))
    # Without the label that is asked for, the option is wrong.
    return case(args, (0, 2, 4), f"{kind} {path.name} {what}")
