"""Files of texts: resumed byte for byte; files of other runs are refused."""

import json
import os
import re

import pytest

from braces_cli.core.errors import BracesError, ConfigError
from braces_cli.steering.output import TextsFile
from tests.conftest import make_adapter
from tests.steering.conftest import LINES, STEERED


def test_a_file_is_resumed_after_its_last_complete_batch(steer, tmp_path):
    """The bytes are those of an uninterrupted run, also in bfloat16, where texts depend on their batch."""
    options = ("--num-samples", 2, *STEERED, "--dtype", "bfloat16", "--batch-size", 4)
    out = tmp_path / "texts.jsonl"
    first = steer("--output", out, *options)
    assert (first.json["texts"], first.json["resumed_from"]) == (10, None)
    whole = out.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == steer(*options).lines
    ends = [place.end() for place in re.finditer(b"\n", whole)]
    # Nothing, one line, inside a line, all but the last newline, everything.
    for length, rows in ((0, 0), (ends[0], 0), (ends[6] + 20, 4), (ends[-1] - 1, 8), (len(whole), 10)):
        out.write_bytes(whole[:length])
        again = steer("--output", out, "--resume", *options)
        assert out.read_bytes() == whole
        assert (again.json["texts"], again.json["resumed_from"]) == (10, rows)


def test_a_complete_file_is_not_changed_and_loads_no_model(steer, tmp_path, monkeypatch):
    """`--resume` without a file starts one."""
    import braces_cli.core.adapter.model as session

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
        (["--resume", "--seed", "1"], 2, "another --seed"),
        (["--resume", "--batch-size", "3"], 2, "another --batch-size"),
        (["--resume", *STEERED], 2, "another --attribute, --s"),
    ],
)
def test_a_file_of_another_run_is_refused(steer, tmp_path, args, code, message):
    """The file does not change."""
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


def test_a_changed_adapter_or_attribute_is_refused(steer, braces, model_dir, adapter_dir, session, tmp_path):
    words = ("attr-build", "--model", model_dir, "--attribute", "x", "--output-dir", tmp_path / "built", "--quiet")
    assert braces(*words, "--words", "good").code == 0
    out = tmp_path / "texts.jsonl"
    options = ("--adapter", adapter_dir, "--attribute", "x", "--attributes", tmp_path / "built", "--output", out)
    assert steer(*options).code == 0
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:-1]))
    assert braces(*words, "--words", "old", "--overwrite").code == 0
    assert "has changed since" in steer(*options, "--resume").err
    assert braces(*words, "--words", "good", "--overwrite").code == 0
    assert steer(*options, "--resume").code == 0
    assert out.read_bytes() == b"".join(lines)
    out.write_bytes(b"".join(lines[:-1]))
    make_adapter(session, adapter_dir, rank=2)
    assert "has changed since" in steer(*options, "--resume").err


def test_other_prompts_and_other_files_are_refused_with_the_line(steer, prompts, tmp_path):
    """Also without a record of settings, as for redirected output."""
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


def test_the_settings_that_texts_depend_on_are_recorded(steer, tmp_path):
    """Other options can change when a run is resumed."""
    out = tmp_path / "texts.jsonl"
    steer("--output", out)
    record = tmp_path / "texts.jsonl.settings.json"
    settings = json.loads(record.read_text())
    assert set(settings) == {
        "model", "adapter", "attribute", "s", "attributes", "layers", "num_samples", "max_new_tokens", "temperature",
        "top_p", "top_k", "stop", "apply_chat_template", "show_unsteered", "seed", "revision", "dtype", "quantize",
        "batch_size", "files", "erase", "scope", "chat_template", "chat_template_kwargs", "system_prompt",
    }  # fmt: skip
    assert steer("--output", out, "--resume", "--device", "cpu").code == 0
    record.write_text(json.dumps(settings | {"apply_chat_template": False}))
    assert "another --apply-chat-template" in steer("--output", out, "--resume").err


def test_a_file_that_cannot_grow_keeps_its_complete_rows(tmp_path):
    """As on a full disk."""
    import resource

    path = tmp_path / "texts.jsonl"
    file = TextsFile(path, {}, 1, resume=False, overwrite=False)
    row = {"prompt": "a", "text": "b" * 500, "attributes": {}, "sample": 0, "seed": 0}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(BracesError, match="too large"):
            file.write([row] * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    complete = path.read_bytes().splitlines(keepends=True)[:3]
    assert [json.loads(line) for line in complete] == [row] * 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_pipe_is_refused(tmp_path, resume):
    """It would block until a reader opens it."""
    os.mkfifo(tmp_path / "texts.jsonl")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        TextsFile(tmp_path / "texts.jsonl", {}, 1, resume=resume, overwrite=not resume)
