"""`braces steer`: files that can be resumed, unsteered twins, conversations, chat templates, terminals and pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = ["the film is", "a day", "the end of the old town", "happy", "a good day and"]
STEERED = ("--attribute", "positive", "--s", "20")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def steer(braces, model_dir, prompts):
    def call(*args, stdin="", given=True):
        source = ["--prompts", prompts] if given else []
        base = ["--model", model_dir, "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]
        return braces("steer", *base, *source, *args, stdin=stdin)

    return call


@pytest.mark.parametrize("where", ["nothing", "one line", "inside a line", "all but the last newline", "everything"])
def test_a_file_is_continued_behind_its_last_complete_line(steer, tmp_path, where):
    """The same bytes as without the interruption, at another batch size."""
    out = tmp_path / "texts.jsonl"
    first = steer("--output", out, "--num-samples", 2, *STEERED)
    assert (first.json["texts"], first.json["resumed_from"]) == (10, None)
    whole = out.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == steer("--num-samples", 2, *STEERED).lines
    ends = [place.end() for place in re.finditer(b"\n", whole)]
    kept = {"nothing": 0, "one line": ends[0], "inside a line": ends[6] + 20, "all but the last newline": ends[-1] - 1}
    out.write_bytes(whole[: kept.get(where, len(whole))])
    again = steer("--output", out, "--resume", "--num-samples", 2, *STEERED, "--batch-size", 3)
    assert out.read_bytes() == whole
    rows = {"nothing": 0, "one line": 1, "inside a line": 7, "all but the last newline": 9}.get(where, 10)
    assert (again.json["texts"], again.json["resumed_from"]) == (10, rows)


def test_a_finished_file_is_left_alone_without_loading_the_model(steer, tmp_path, monkeypatch):
    """And one that is not there yet is begun."""
    import braces_cli.core.session as session

    out = tmp_path / "new" / "texts.jsonl"
    assert steer("--output", out, "--resume").json["texts"] == 5
    before = out.stat()
    monkeypatch.setattr(session, "open_session", None)
    assert steer("--output", out, "--resume").json["texts"] == 5
    assert out.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "exists already"),
        (["--resume", "--overwrite"], 2, "both are given"),
        (["--resume", "--temperature", "0.5"], 2, "another --temperature"),
        (["--resume", "--seed", "1"], 2, "another --seed"),
        (["--resume", *STEERED], 2, "another --attribute, --s"),
    ],
)
def test_a_file_of_another_run_is_not_continued(steer, tmp_path, args, code, message):
    """Nor replaced; nothing in it changes."""
    out = tmp_path / "texts.jsonl"
    steer("--output", out)
    out.write_bytes(out.read_bytes()[:-40])
    before = out.read_bytes()
    outcome = steer("--output", out, *args)
    assert outcome.code == code, outcome.err
    assert message in outcome.json["error"]["message"]
    assert out.read_bytes() == before
    assert steer("--output", out, "--overwrite", "--adapter", "nowhere").code == 4
    assert out.read_bytes() == before
    assert steer("--output", out, "--overwrite").code == 0
    assert len(out.read_text().splitlines()) == 5


def test_other_prompts_and_foreign_files_are_refused_with_their_line(steer, prompts, tmp_path):
    """Even where no settings stand beside the file, as when the rows were piped into it."""
    out = tmp_path / "texts.jsonl"
    out.write_text(steer().out)
    assert steer("--output", out, "--resume").json["resumed_from"] == 5
    assert f"{out}:1" in steer("--output", out, "--resume", "--num-samples", 2, "--seed", 4).err
    prompts.write_text("\n".join([*LINES[:2], "another", *LINES[3:]]) + "\n")
    assert steer("--output", out, "--resume").json["error"]["where"] == f"{out}:3"
    prompts.write_text("\n".join(LINES[:4]) + "\n")
    assert "fewer texts" in steer("--output", out, "--resume").err
    out.write_text('{"prompt": "a"}\n')
    assert steer("--output", out, "--resume").code == 3
    assert "--output" in steer("--resume").err


def test_prompts_are_read_as_they_are_needed(session):
    """One batch ahead at most, of however many there are."""
    from itertools import count, islice

    from braces_cli.core.models.generation import Sampling
    from braces_cli.steering.generate_texts import generate_rows, jobs_of

    read = []
    endless = (read.append(k) or f"prompt {k}" for k in count())
    rows = generate_rows(session, jobs_of(endless, 2), {}, Sampling(2), batch_size=4)
    assert [row["prompt"] for row in islice(rows, 5)] == ["prompt 0"] * 2 + ["prompt 1"] * 2 + ["prompt 2"]
    assert len(read) <= 5


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_twin_is_the_text_without_attribute(steer, adapter_dir, with_adapter):
    """--beside adds `unsteered` and leaves `text` as it is; at s = 0 the two are one."""
    extra = ["--adapter", adapter_dir] if with_adapter else []
    plain, moved = steer(*extra).lines, steer(*extra, *STEERED).lines
    both = steer(*extra, *STEERED, "--beside").lines
    assert [row["text"] for row in both] == [row["text"] for row in moved]
    assert [row["unsteered"] for row in both] == [row["text"] for row in plain]
    assert any(row["unsteered"] != row["text"] for row in both)
    zero = steer(*extra, "--attribute", "positive", "--s", 0, "--beside").lines
    assert all(row["unsteered"] == row["text"] for row in zero)


def test_a_stop_text_ends_texts(steer):
    """Before it, in every row."""
    whole, cut = steer().lines, steer("--stop", "e", "--stop", "a").lines
    assert [row["text"] for row in cut] == [re.split("[ea]", row["text"])[0] for row in whole]
    assert steer("--stop", "").code == 2


def test_a_conversation_from_a_pipe(steer):
    """Line by line: prompts, commands, mistakes; each text beside its twin."""
    lines = ["the film is", "/s -5", "", "/attribute angry", "", "/seed", "", "/s x", "/nope", "//slash", "/quit", "no"]
    outcome = steer("--interactive", *STEERED, stdin="\n".join(lines) + "\n", given=False)
    assert outcome.code == 0, outcome.err
    rows = outcome.lines
    assert [row["attributes"] for row in rows] == [
        {"positive": 20.0}, {"positive": -5.0}, {"angry": -5.0}, {"angry": -5.0}, {"angry": -5.0},
    ]  # fmt: skip
    assert [row["prompt"] for row in rows] == ["the film is"] * 4 + ["/slash"]
    assert [row["seed"] for row in rows] == [0, 0, 0, 1, 1]
    assert rows[0]["unsteered"] == rows[1]["unsteered"] == rows[2]["unsteered"] != rows[3]["unsteered"]
    assert len({row["text"] for row in rows[:3]}) > 1
    # The same as the plain command says at the same seed.
    (plain,) = steer("--prompt", "the film is", *STEERED, given=False).lines
    assert plain["text"] == rows[0]["text"]
    for note in (
        "/help shows the commands",
        "positive -5, seed 0",
        "/s: this needs a number",
        "/nope: no such command",
    ):
        assert note in outcome.err


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["/attribute positive angry", "/s 2 -1"], "positive +2, angry -1"),
        (["/attribute positive angry", "/s angry -3"], "positive +1, angry -3"),
        (["/s 2"], "Name an attribute first"),
        (["/attribute"], "There are: angry"),
        (["/attribute purple"], "unknown attribute `purple`"),
        (["/layers 1", "/temperature 0"], "no attribute, seed 0, temperature 0, layers 1"),
        (["/layers 9"], "Error: "),
        (["/temperature -1"], "out of range"),
        (["/top_p"], "Such as /top-p 0.9"),
        (["/help"], "/attribute NAME"),
        ([""], "/attribute NAME"),
    ],
)
def test_commands_say_what_is_set_or_what_is_wrong(session, lines, shown):
    """And a mistake changes nothing."""
    from braces_cli.core.models.generation import Sampling
    from braces_cli.core.utils.errors import BracesError
    from braces_cli.steering.interactive import Conversation

    talk = Conversation(session, {}, Sampling(4))
    for line in lines:
        before = talk.shown()
        try:
            answer = talk.handle(line)
        except BracesError as error:
            answer = f"Error: {error}"
            assert talk.shown() == before
    assert shown in answer
    assert talk.handle("/quit") is None


@pytest.mark.parametrize("option", [["--prompt", "a"], ["--num-samples", "2"], ["--output", "x.jsonl"]])
def test_what_a_conversation_takes_no_part_in(steer, option):
    """Exit 2 before a model is loaded."""
    outcome = steer("--interactive", *option, given=False)
    assert outcome.code == 2
    assert "does not go with --interactive" in outcome.err


def test_chat_templates_are_used_as_asked_and_else_as_in_training(braces, chatty, model_dir, adapter_dir):
    """One start token, not two; the row keeps the user's words."""
    base = ["steer", "--device", "cpu", "--max-new-tokens", 8, "--format", "json"]

    def text(*args, prompt="a day"):
        outcome = braces(*base, *args, "--prompt", prompt)
        assert outcome.code == 0, outcome.err
        assert outcome.lines[0]["prompt"] == prompt
        return outcome.lines[0]["text"]

    spelt = text("--model", chatty, prompt="user: a day\nassistant:")
    assert text("--model", chatty, "--apply-chat-template") == spelt != text("--model", chatty)
    config = adapter_dir / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"training": {"chat_template": True}}))
    adapted = ["--model", chatty, "--adapter", adapter_dir]
    bare = text(*adapted, "--no-apply-chat-template", prompt="user: a day\nassistant:")
    assert text(*adapted) == bare != text(*adapted, "--no-apply-chat-template")
    refused = braces(*base, "--model", model_dir, "--apply-chat-template", "--prompt", "a")
    assert refused.code == 2
    assert "no chat template" in refused.err


def test_the_table_of_texts(steer):
    """Every prompt and text, the twin between them, no markup read."""
    outcome = steer("--format", "table", "--beside", *STEERED, "--prompt", "[red]a", given=False)
    assert "[red]a" in outcome.out
    assert "unsteered" in outcome.out
    assert "positive +20" in outcome.out


def test_results_go_to_a_redirected_stdout_while_a_bar_is_drawn(model_dir):
    """stderr a terminal and stdout a file, as in `braces steer ... > texts.jsonl`."""
    import pty

    master, slave = pty.openpty()
    argv = ["steer", "--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "8", "--prompt", "a day"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    run = subprocess.Popen(
        [sys.executable, "-m", "braces_cli", *argv], stdout=subprocess.PIPE, stderr=slave, env=environment, text=True
    )
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    out = run.communicate()[0]
    assert run.returncode == 0
    assert json.loads(out)["prompt"] == "a day"
    assert b"generating" in shown
    assert b"prompt" not in shown


def test_one_text_at_a_time_is_printed_as_it_is_generated(session, capsys):
    """The prompt, then the text; the same as in a row."""
    from braces_cli.cli.steer_display import Flow
    from braces_cli.core.models.generation import Sampling
    from braces_cli.steering.generate_texts import generate_rows, jobs_of

    rows = list(generate_rows(session, jobs_of(LINES[:2]), {}, Sampling(8)))
    flow, pieces = Flow(), []

    def write(job, piece):
        pieces.append(piece)
        flow.write(job, piece)

    flow.run(generate_rows(session, jobs_of(LINES[:2]), {}, Sampling(8), batch_size=1, stream=write))
    assert capsys.readouterr().out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert len(pieces) > 4


def test_a_reader_who_leaves_early_is_no_error(braces, model_dir, prompts, monkeypatch):
    """`| head -1`, whether the JSON or the table finds out."""
    import sys as system

    class Gone:
        """A pipe that nobody reads."""

        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self):
            return False

    for fmt in ("json", "table"):
        monkeypatch.setattr(system, "stdout", Gone())
        outcome = braces("steer", "--model", model_dir, "--prompts", prompts, "--max-new-tokens", 2, "--format", fmt)
        assert (outcome.code, outcome.err) == (0, "")
