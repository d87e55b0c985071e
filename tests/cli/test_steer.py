"""`braces steer`: strengths, output on terminals and in pipes, attribute files, errors."""

import io
import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest

from braces_cli.cli.main import main
from braces_cli.cli.steer import _lines, print_rows, print_stream, print_texts
from braces_cli.core.errors import DataError
from braces_cli.core.models.generate import TextRequest
from braces_cli.core.options import Sampling
from braces_cli.steering.texts import generate_rows, text_requests
from tests.cli.test_output import HOSTILE, controls

LINES = ["the film is", "a day"]
PROMPTS = ["the film is", "a day", "the end of the old town and the film is"]


@pytest.fixture
def steer(braces, model_dir):
    def call(*args, stdin="", model=True, prompts=PROMPTS):
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        base = ["--model", model_dir, "--device", "cpu"] if model else []
        return braces("steer", *base, *asked, "--max-new-tokens", 12, *args, stdin=stdin)

    return call


def texts(outcome):
    assert outcome.code == 0, outcome.err
    return [row["text"] for row in outcome.lines]


def test_rows_hold_the_keys_of_the_contract(steer):
    """The samples of a prompt are adjacent."""
    outcome = steer("--num-samples", 2, "--attribute", "positive", "--s", "1.5", "--attribute", "negative", "--s", "-2")
    assert len(outcome.lines) == 6
    first = outcome.lines[1]
    assert set(first) == {"prompt", "text", "attributes", "sample", "seed"}
    assert (first["prompt"], first["sample"]) == (PROMPTS[0], 1)
    assert first["attributes"] == {"positive": 1.5, "negative": -2.0}
    assert outcome.lines[0]["text"] != first["text"]


def test_a_sampled_text_does_not_depend_on_its_batch(steer):
    """There is one random stream per (seed, prompt, sample)."""
    one = texts(steer("--num-samples", 2, "--batch-size", 1))
    assert one == texts(steer("--num-samples", 2, "--batch-size", 4))
    assert one != texts(steer("--num-samples", 2, "--seed", 1))


def test_stderr_has_the_size_of_the_steering_vector(steer):
    assert "30.0% of the residual stream" in steer("--attribute", "positive", "--s", 3).err
    assert "nothing is added" in steer("--attribute", "positive", "--s", 0).err
    assert steer("--attribute", "positive", "--s", 3, "--quiet").err == ""


def test_prompts_from_a_file_and_from_a_pipe(steer, tmp_path):
    """Plain lines and JSON Lines, also with nested prompts."""
    lines = tmp_path / "p.txt"
    lines.write_text("the film is\n\na day\n")
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": {"text": "the film is"}}\n{"prompt": "a day"}\n')
    piped = texts(steer(prompts=[], stdin=lines.read_text()))
    assert len(piped) == 2
    assert piped == texts(steer("--prompts", lines, prompts=[])) == texts(steer("--prompts", rows, prompts=[]))
    assert piped == texts(steer(prompts=[], stdin=rows.read_text()))


def test_built_attributes_are_found_before_the_built_in_ones(braces, steer, model_dir, tmp_path):
    """With `--attributes DIR`. In a file of words, comments and blank lines are skipped."""
    folder, words = tmp_path / "attrs", tmp_path / "w.txt"
    words.write_text("# mine\nold\n\n town \n")
    build = ["attr-build", "--model", model_dir, "--output-dir", folder, "--format", "json"]
    outcome = braces(*build, "--attribute", "positive", "--words", "old, town ,old")
    assert outcome.json["words"] == ["old", "town"]
    assert (outcome.json["layers"], outcome.json["hidden_size"]) == (2, 32)
    assert outcome.json["path"] == str(folder / "positive.safetensors")
    assert braces(*build, "--attribute", "old", "--words-file", words).json["words"] == ["old", "town"]
    own = texts(steer("--attribute", "positive", "--s", 30, "--attributes", folder))
    assert own == texts(steer("--attribute", "old", "--s", 30, "--attributes", folder))
    assert own != texts(steer("--attribute", "positive", "--s", 30))
    assert "exists already" in braces(*build, "--attribute", "old", "--words", "day").json["error"]["message"]
    assert braces(*build, "--attribute", "old", "--words", "day", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--attribute", "positve"], 2, "Did you mean positive"),
        (["--attribute", "positive", "--s", "nan"], 2, "is not a number"),
        (["--attribute", "positive", "--s", "1", "--s", "2"], 2, "2 strengths for 1 attributes"),
        (["--s", "1"], 2, "Name the attribute with --attribute"),
        (["--attribute", "../x"], 2, "cannot name an attribute"),
        (["--attributes", "nowhere"], 2, "no such folder"),
        (["--temperature", "-1"], 2, "at least 0"),
        (["--top-p", "0"], 2, "more than 0"),
        (["--max-new-tokens", "500"], 2, "500 is too much"),
        (["--adapter", "nowhere"], 4, "no such adapter folder"),
    ],
)
def test_bad_input(steer, args, code, message):
    """The message has at most two lines."""
    outcome = steer(*args)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 2
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("stdin", "message"),
    [("", "no prompts"), ('{"prompt": 3}\n', "no `prompt` with text"), ('{"prompt\n', "broken JSON")],
)
def test_bad_pipes_exit_3(steer, stdin, message):
    outcome = steer(prompts=[], stdin=stdin)
    assert outcome.code == 3
    assert message in outcome.err


def test_the_table_of_texts(steer):
    """It has prompt, unsteered and steered text; markup is not interpreted."""
    outcome = steer("--format", "table", "--show-unsteered", "--attribute", "positive", "--s", 20, prompts=["[red]a"])
    assert "[red]a" in outcome.out
    assert "unsteered" in outcome.out
    assert "positive +20" in outcome.out


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        (["--interactive"], ["--num-samples", "2"]),
        (["--interactive"], ["--output", "x.jsonl"]),
        (["--attribute", "positive", "--sweep", "0"], ["--show-unsteered"]),
        (["--attribute", "positive", "--sweep", "0"], ["--resume", "--dry-run"]),
    ],
)
def test_options_without_effect_in_a_mode_are_refused(steer, tmp_path, monkeypatch, mode, option):
    """By name, also with `--dry-run`; nothing is written."""
    monkeypatch.chdir(tmp_path)
    outcome = steer(*mode, *option, prompts=[])
    assert outcome.code == 2
    assert f"{option[0]}: does not go with --" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_results_go_to_a_redirected_stdout_while_a_bar_is_drawn(model_dir, monkeypatch):
    """stderr a terminal and stdout a file, as in `braces steer ... > texts.jsonl`."""
    master, slave = pty.openpty()
    argv = ["steer", "--model", str(model_dir), "--device", "cpu", "--max-new-tokens", "8", "--prompt", "a day"]
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        with pytest.raises(SystemExit) as ended:
            main(argv)
        terminal.flush()
        shown = os.read(master, 100_000)
    os.close(master)
    assert ended.value.code == 0
    assert json.loads(out.getvalue())["prompt"] == "a day"
    assert b"generating" in shown
    assert b"prompt" not in shown


def test_one_text_at_a_time_is_printed_as_it_is_generated(session, capsys):
    """The prompt, then its text."""
    rows = list(generate_rows(session, text_requests(LINES), Sampling(8)))
    pieces = []

    def generate(stream):
        def write(request, piece):
            pieces.append(piece)
            stream(request, piece)

        return generate_rows(session, text_requests(LINES), Sampling(8), batch_size=1, stream=write)

    print_stream(generate)
    assert capsys.readouterr().out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    assert len(pieces) > 4


@pytest.mark.parametrize("kind", HOSTILE)
def test_generated_text_keeps_its_lines(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Other control characters are escaped; nothing is cut."""
    text = f"{HOSTILE[kind]}\n\tend"
    row = {"prompt": text, "text": text, "unsteered": text, "attributes": {"positive": 1.0}}
    print_rows([row])
    print_texts([row])
    print_stream(lambda stream: [stream(TextRequest("", 0), text), row][1:])
    out = capsys.readouterr().out
    assert controls(out) <= {"\t"}
    assert out.count("\n\tend") == 6
    if kind in ("markup", "emoji code", "long"):
        assert out.count(HOSTILE[kind]) == 6


def test_texts_alone_go_into_a_pipe(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    """`--format text`: each prompt with its continuation; `-` reads prompts from the pipe."""
    call = ("steer", "--model", model_dir, "--prompts", "-", "--max-new-tokens", 4, "--device", "cpu")
    rows = braces(*call, "--format", "json", stdin="the film is\na day\n").lines
    shown = braces(*call, "--format", "text", stdin="the film is\na day\n")
    assert shown.out == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}:{% endfor %}")
    chat = (*call, "--chat-template", tmp_path / "chat.jinja")
    (row,) = braces(*chat, "--format", "json", stdin="a day\n").lines
    assert braces(*chat, "--format", "text", stdin="a day\n").out == f"a day\n{row['text']}\n\n"
    assert braces(*call, "--format", "text", "--show-unsteered", stdin="a\n").code == 2
    table = braces(*call, "--format", "table", stdin="the film is\na day\n").out
    assert f"prompt: {rows[0]['prompt']}" in table


def test_a_built_in_list_instead_of_a_file_is_reported(braces: Any, model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "attributes"
    braces("attr-build", "--model", model_dir, "--attribute", "warm", "--words", "good", "--output-dir", folder)
    call = ("steer", "--model", model_dir, "--prompt", "a", "--max-new-tokens", 2, "--attributes", folder)
    assert "its built-in word list is used" in braces(*call, "--attribute", "positive").err
    assert "built-in" not in braces(*call, "--attribute", "warm").err


def test_conversation_lines_that_are_not_text_are_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(_lines())
