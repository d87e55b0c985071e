"""The `braces` command: start-up, usage errors, exit codes, and failures of standard streams."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VIEWS = ("values", "find", "trace", "clamp", "report")
COMMANDS = [["train"], ["eval"], ["attr-build"], ["steer"], ["inspect"], *(["inspect", view] for view in VIEWS)]
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "accelerate", "safetensors", "scipy", "numpy", "yaml"}


def imported_by(code: str) -> set[str]:
    """Return the heavy modules that a new process has imported after `code`."""
    probe = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    probe += f"print(*(set(sys.modules) & {HEAVY!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, errors="replace", check=True)
    return set(done.stderr.split())


def call(*args: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `braces ARGS` in a new process, in a shell that redirects its streams."""
    line = f'exec "$0" -m braces_cli "$@" {redirect}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line, sys.executable, *args], capture_output=True, env=env, check=False)


def test_help_imports_no_heavy_module() -> None:
    """No command's --help imports torch and the like; the check itself detects torch."""
    calls = "; ".join(f"[help_page({argv!r})]" for argv in [[], *COMMANDS])
    code = (
        "from braces_cli.cli.main import build_app; "
        "help_page = lambda words: build_app(words)([*words, '--help'], standalone_mode=False); "
    )
    assert imported_by(code + calls) == set()
    assert "torch" in imported_by("import torch")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--nope"], "No such option: --nope"),
        (["train", "--rank", "x"], "--rank"),
        (["train", "--rank", "0"], "at least 1"),
        (["steer", "--format", "xml"], "one of table, json, text"),
        (["train", "--rank"], "See `braces train --help`"),
        (["inspect", "values", "--layers"], "See `braces inspect values --help`"),
        *((command, "It takes one value") for command in (
            ["steer", "--prompt", "a", "--adapter", "a", "--adapter", "b"],
            ["merge", "--adapter", "a", "--adapter", "b"],
            ["inspect", "values", "--adapter", "a", "--adapter", "b"],
        )),
    ],
)  # fmt: skip
def test_a_usage_error_is_two_lines(braces: Any, argv: list[str], message: str) -> None:
    """Exit code 2 and nothing on stdout; with `--format json`, a JSON document on stdout too."""
    outcome = braces(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert 1 <= len(outcome.err.strip().splitlines()) <= 2
    assert outcome.err.startswith("Error: ")
    assert message in outcome.err


def test_an_error_as_json(braces: Any) -> None:
    outcome = braces("train", "--format", "json")
    assert outcome.code == outcome.json["error"]["code"] == 2
    assert set(outcome.json["error"]) == {"code", "message", "where", "hint"}


def test_underscores_are_accepted(braces: Any, model_dir: Path) -> None:
    outcome = braces("train", "--model", model_dir, "--max_steps", "7", "--dry_run", "--format", "json")
    assert outcome.json["settings"]["max_steps"] == 7


def failing(braces: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """Return the outcome of a command in which `error` is raised."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("braces_cli.cli.recipe.recipes", fail)
    return braces("recipe", "list")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ZeroDivisionError("inside"), 1, "Error: ZeroDivisionError: inside\nThis is a fault of braces"),
        (KeyboardInterrupt(), 130, "Error: interrupted\n"),
        (MemoryError(), 1, "Error: out of memory\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "Error: out of memory\n"),
        (OSError(28, "No space left on device"), 1, "Error: No space left on device\nThe disk is full"),
        (OSError(36, "File name too long", "xxx"), 2, "Error: xxx: File name too long\n"),
        (ImportError("libx.so"), 1, "Error: a library cannot be loaded: libx.so\n"),
    ],
)
def test_an_exception_has_its_exit_code(braces, monkeypatch, error, code, text):
    """One or two lines without a traceback."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handler = signal.getsignal(signal.SIGTERM)
    outcome = failing(braces, monkeypatch, error)
    assert (outcome.code, outcome.out) == (code, "")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert outcome.err.lstrip("\n").startswith(text)
    assert "Traceback" not in outcome.err


def test_a_terminated_run_exits_143(model_dir: Path) -> None:
    """SIGTERM unwinds the stack, so that temporary files are removed."""
    pipe = subprocess.Popen(
        [sys.executable, "-m", "braces_cli", "steer", "--model", model_dir, "--format", "json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert pipe.stdin is not None
    pipe.stdin.write("the film\n" * 8)  # a full batch; the pipe stays open, so the command waits for more
    pipe.stdin.flush()
    assert pipe.stdout is not None
    pipe.stdout.readline()
    pipe.send_signal(signal.SIGTERM)
    _, err = pipe.communicate(timeout=60)
    assert pipe.returncode == 143
    assert err.strip().splitlines()[-1] == "Error: terminated"


@pytest.mark.parametrize(
    ("args", "redirect", "code"),
    [
        (["recipe", "copy", "nope"], "2>/dev/full", 2),
        (["recipe", "copy", "nope", "--format", "json"], ">/dev/full", 2),
        (["recipe", "list", "--help"], ">/dev/full", 1),
        (["recipe", "list"], "| true", 0),
        (["recipe", "list"], "</dev/null 2>/dev/full", 0),
    ],
)
def test_a_full_or_closed_stream_keeps_the_exit_code(args: list[str], redirect: str, code: int) -> None:
    """The other streams receive no traceback."""
    done = call(*args, redirect=redirect)
    assert done.returncode == code
    text = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text


def test_streams_are_utf8() -> None:
    """In every locale."""
    name = "é☃日"
    done = call("recipe", "copy", name, "--format", "json", PYTHONIOENCODING="latin-1", LC_ALL="C")
    assert done.returncode == 2
    assert f"`{name}`" in json.loads(done.stdout.decode())["error"]["message"]
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("command", ["train", "eval", "steer", "merge", "attr-build"])
def test_a_dry_run_prints_the_settings(braces: Any, model_dir: Path, adapter_dir: Path, command: str) -> None:
    """A table without empty values, or JSON."""
    more = {
        "eval": ["--tasks", "popqa"],
        "merge": ["--adapter", adapter_dir, "--output-dir", "out"],
        "steer": ["--prompt", "a"],
    }
    words = (command, "--model", model_dir, *more.get(command, []), "--dry-run", "--format")
    assert "model" in braces(*words, "json").json["settings"]
    shown = braces(*words, "table").out
    assert "dry run" in shown
    assert "None" not in shown
    assert "()" not in shown


def test_env_reports_versions_devices_and_caches(braces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokens."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = braces("env", "--format", "json")
    keys = {"braces", "python", "system", "versions", "devices", "finite", "threads", "caches", "variables"}
    assert keys == set(outcome.json)
    assert outcome.json["finite"]["cpu"] is True
    assert {"torch", "transformers"} <= set(outcome.json["versions"])
    table = braces("env").out
    assert "torch" in table
    assert "hf_secret" not in outcome.out + table
    monkeypatch.setattr("torch.Tensor.softmax", lambda tensor, dim: tensor / 0)
    assert braces("env", "--format", "json").json["finite"]["cpu"] is False


@pytest.mark.parametrize("command", ["merge", "attr-build"])
@pytest.mark.usefixtures("in_process")
def test_an_upload_is_checked_first_and_done_last(braces, model_dir, adapter_dir, tmp_path, monkeypatch, command):
    from braces_cli.core.models import hub

    calls: list[Any] = []
    monkeypatch.setattr(hub, "check_push", lambda repo: calls.append(("check", repo)))
    monkeypatch.setattr(hub, "push", lambda folder, repo, *rest: calls.append((folder, repo, *rest)))
    out = tmp_path / "out"
    words = {
        "merge": ("merge", "--adapter", adapter_dir, "--output-dir", out),
        "attr-build": ("attr-build", "--model", model_dir, "--attribute", "a", "--words", "good", "--output-dir", out),
    }[command]
    outcome = braces(*words, "--push-to-hub", "me/it")
    assert outcome.code == 0, outcome.err
    files = [["a.safetensors"]] if command == "attr-build" else []
    assert calls == [("check", "me/it"), (out, "me/it", *files)]
