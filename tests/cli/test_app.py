"""The frame: light start, streams, exit codes, config files."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import pytest

LOOKS = ("values", "find", "trace", "clamp", "report")
COMMANDS = [["train"], ["eval"], ["attr-build"], ["steer"], ["inspect"], *(["inspect", look] for look in LOOKS)]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "lm_eval",
    "accelerate",
    "safetensors",
    "scipy",
    "numpy",
    "yaml",
}


def imported_by(code: str, modules: set[str] = HEAVY) -> set[str]:
    """Which of these modules a fresh process has imported after running `code`."""
    probe = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    probe += f"print(*(set(sys.modules) & {modules!r}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("argv", [[], *COMMANDS, ["--version"]])
def test_help_stays_light(argv):
    """No command's --help imports torch or its like, nor what only some calls need."""
    code = f"from braces_cli.cli.main import main; main({[*argv, '--help']!r})"
    assert imported_by(code, HEAVY) == set()


def test_the_page_of_all_commands_imports_none_of_them(monkeypatch):
    """Its summaries are those of the commands themselves, in the same order."""
    from braces_cli.cli import main
    from braces_cli.cli.main import build_app

    code = "from braces_cli.cli.main import main; main(['--help'])"
    assert imported_by(code, {"braces_cli.cli.main", "braces_cli.cli.train"}) == {"braces_cli.cli.main"}
    monkeypatch.setenv("COLUMNS", "200")
    pages = []
    for args in ([], ["--help"]):
        command, context = main.help_of(build_app(args), [])
        with contextlib.redirect_stdout(io.StringIO()) as page:
            command.get_help(context)
        pages.append(page.getvalue())
    assert "attr-build" in pages[0]
    assert pages[0] == pages[1]


def test_the_probe_can_see_torch():
    """Or the test above would prove nothing."""
    assert "torch" in imported_by("import torch")


@pytest.mark.parametrize("argv", COMMANDS)
def test_every_command_and_option_has_help(braces, argv):
    """A newcomer can read what each option does."""
    shown = braces(*argv, "--help")
    assert shown.code == 0
    assert "--format" in shown.out


def test_version(braces):
    """`braces --version` prints it and leaves."""
    from braces_cli import __version__

    assert braces("--version").out == f"braces {__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [["trian"], ["train", "--nope"], ["train", "--rank", "x"], ["train", "--rank", "0"], ["steer", "--format", "xml"]],
)
def test_a_wrong_call_exits_2_with_two_lines(braces, argv):
    """Usage errors, as text and as JSON."""
    outcome = braces(*argv)
    assert outcome.code == 2
    assert outcome.out == ""
    assert 1 <= len(outcome.err.strip().splitlines()) <= 2
    assert outcome.err.startswith("Error: ")


def test_a_failure_with_json_is_a_json_document_too(braces):
    """{"error": {"code", "message", "where", "hint"}} on stdout."""
    outcome = braces("train", "--format", "json")
    assert outcome.code == 2
    assert set(outcome.json["error"]) == {"code", "message", "where", "hint"}
    assert outcome.json["error"]["code"] == 2


def test_underscores_are_accepted(braces, model_dir):
    """--max_steps and --max-steps are one option."""
    outcome = braces("train", "--model", model_dir, "--max_steps", "7", "--dry_run", "--format", "json")
    assert outcome.json["settings"]["max_steps"] == 7


def test_a_config_file_gives_defaults_and_the_command_line_wins(braces, model_dir, tmp_path):
    """Dashes or underscores in keys; lists for repeatable options."""
    path = tmp_path / "a.yaml"
    path.write_text(
        f"model: {model_dir}\nrank: 8\nmax-steps: 5\ngate_lr: 0.5\ndata: [a.jsonl, b.jsonl]\nformat: json\n"
    )
    settings = braces("train", "--config", path, "--rank", "4", "--dry-run").json["settings"]
    assert (settings["rank"], settings["max_steps"], settings["gate_lr"]) == (4, 5, 0.5)
    assert settings["data"] == ["a.jsonl", "b.jsonl"]


def test_words_and_truth_values_of_a_config_file(braces, tmp_path):
    """Of a command that is a settings class, too; `off`, `yes` and their like are words where an option takes words."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "stop: [off, 'yes']\nshow_unsteered: yes\noverwrite: false\napply_chat_template: off\nprompts: p.txt\n"
    )
    settings = braces("steer", "--config", path, "--dry-run").json["settings"]
    assert settings["stop"] == ["off", "yes"]
    assert (settings["show_unsteered"], settings["overwrite"], settings["apply_chat_template"]) == (True, False, False)
    assert settings["prompts"] == "p.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 4\n", "unknown key `rnak`"),
        ("rank: [\n", "not YAML"),
        ("- rank\n", "expected object"),
        ("rank: many\n", "rank"),
    ],
)
def test_a_config_that_is_wrong_exits_2(braces, tmp_path, text, message):
    """With the file, the key, and a suggestion where one is near."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    outcome = braces("train", "--config", path, "--dry-run")
    assert outcome.code == 2
    assert message in outcome.err
    if "rnak" in text:
        assert "Did you mean rank?" in outcome.err
        assert str(path) in outcome.err


def test_a_bug_of_ours_is_one_line_without_a_traceback(braces, model_dir, monkeypatch):
    """Unless --debug asks for it."""
    import braces_cli.inspection.summary as summary

    def broken(*args, **kwargs):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(summary, "find_ffns", broken)
    outcome = braces("inspect", "--model", model_dir)
    assert outcome.code == 1
    assert "ZeroDivisionError: inside" in outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.err.splitlines()) == 2


def test_an_interrupt_exits_130(braces, model_dir, monkeypatch):
    """As shells expect of Ctrl-C."""
    import braces_cli.inspection.summary as summary

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(summary, "find_ffns", interrupted)
    outcome = braces("inspect", "--model", model_dir)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1] == "Error: interrupted"


def test_a_terminated_run_exits_143(model_dir, tmp_path):
    """SIGTERM unwinds like any failure, so that temporary files go."""
    import signal
    import time

    pipe = subprocess.Popen(
        [sys.executable, "-m", "braces_cli", "steer", "--model", model_dir, "--format", "json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert pipe.stdin is not None
    pipe.stdin.write("the film\n" * 8)  # a full batch; the pipe stays open, so the run waits for more
    pipe.stdin.flush()
    assert pipe.stdout is not None
    pipe.stdout.readline()
    time.sleep(0.2)
    pipe.send_signal(signal.SIGTERM)
    _, err = pipe.communicate(timeout=60)
    assert pipe.returncode == 143
    assert err.strip().splitlines()[-1] == "Error: terminated"


def test_every_module_can_be_imported():
    """No file that only imports on somebody's machine."""
    import importlib
    import pkgutil

    import braces_cli

    names = [m.name for m in pkgutil.walk_packages(braces_cli.__path__, "braces_cli.")]
    assert len(names) > 30
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def test_no_option_folder_is_named_tilde(braces, model_dir, tmp_path, monkeypatch):
    """What is written goes where what is read comes from."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    outcome = braces(
        "attr-build", "--model", model_dir, "--attribute", "warm", "--words", "warm,sunny", "--output-dir=~/attributes"
    )
    assert outcome.code == 0, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "attributes" / "warm.safetensors").is_file()


@pytest.mark.parametrize("command", ["train", "merge", "eval"])
def test_an_output_folder_that_cannot_be_made_is_refused_at_once(braces, model_dir, adapter_dir, tmp_path, command):
    """Below a file, and where the system refuses: exit 2, with the reason."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the film"}\n')
    more = {
        "train": ["--data", rows, "--model", model_dir],
        "merge": ["--adapter", adapter_dir, "--model", model_dir],
        "eval": ["--tasks", "perplexity", "--task-data", f"perplexity={rows}", "--model", model_dir],
    }[command]
    for folder, reason in ((rows / "out", "is a file"), ("/proc/braces/out", "cannot write there")):
        outcome = braces(command, *more, "--output-dir", folder)
        assert outcome.code == 2, outcome.err
        assert reason in outcome.err
        assert "fault of braces" not in outcome.err


def test_help_lists_its_short_name(braces):
    """`-h` beside `--help`."""
    assert "-h" in braces("train", "--help").out.split()


def test_an_option_without_its_value_points_to_the_help_of_its_command(braces):
    """Not to that of braces."""
    assert "See `braces train --help`" in braces("train", "--rank").err
    assert "See `braces inspect values --help`" in braces("inspect", "values", "--layers").err


@pytest.mark.parametrize("command", [["steer", "--prompt", "a"], ["merge"], ["inspect"], ["inspect", "values"]])
def test_two_adapters_are_refused_where_one_is_used(braces, command):
    """Only eval takes several."""
    outcome = braces(*command, "--adapter", "a", "--adapter", "b")
    assert outcome.code == 2
    assert "It takes one value" in outcome.err


@pytest.mark.parametrize("argv", [*COMMANDS, ["merge"]])
def test_the_options_that_matter_most_come_first(argv):
    """At most five, in the first panel of the help, behind the arguments."""
    from braces_cli.cli import main
    from braces_cli.cli.main import build_app

    command, _ = main.help_of(build_app(), argv)
    options = [p for p in command.params if p.nargs != -1 and p.name != "ctx" and p.opts[0].startswith("-")]
    panels = [getattr(p, "rich_help_panel", None) for p in options]
    count = panels.index(next(filter(None, panels), None)) if any(panels) else len(panels)
    assert count >= 1
    if argv in (["train"], ["eval"], ["steer"], ["merge"]):
        assert count == 5


@pytest.mark.parametrize(
    ("command", "option", "typed", "offered"),
    [
        ("steer", "attribute", "pos", "positive"),
        ("steer", "scorer", "va", "vader"),
        ("eval", "tasks", "popqa,tru", "popqa,truthfulqa"),
        ("eval", "scorer", "sentiment=v", "sentiment=vader"),
        ("train", "method", "lo", "lora"),
        ("train", "schedule", "co", "cosine"),
    ],
)
def test_values_are_completed_without_heavy_imports(command, option, typed, offered):
    """What a shell offers after Tab."""
    code = (
        "from braces_cli.cli.main import build_app, help_of; "
        f"c, x = help_of(build_app(), [{command!r}]); "
        f"p = next(p for p in c.params if p.name == {option!r}); "
        f"assert {offered!r} in [str(getattr(v, 'value', v)) for v in p.shell_complete(x, {typed!r})]"
    )
    assert imported_by(code) == set()


def test_common_tasks_are_those_that_there_are():
    """The names that a shell offers."""
    from braces_cli.evaluation.catalog import GROUPS, NATIVE_TASKS
    from braces_cli.evaluation.settings import TASK_NAMES

    assert {*GROUPS, *NATIVE_TASKS} <= set(TASK_NAMES)
