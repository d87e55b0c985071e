"""The steps that all exports share: output folder, inputs, files of the base, failures."""

import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from braces_cli.api import Model
from braces_cli.core.adapter.model import Session, open_session
from braces_cli.core.errors import BracesError, ConfigError, ModelError
from braces_cli.core.models.load import Base
from braces_cli.core.models.tokenize import decode_continuation, encode
from braces_cli.export.checkpoint import export_merge
from braces_cli.export.code import export_code
from braces_cli.export.run import copy_companions, new_folder
from tests.conftest import tiny_model
from tests.export.models import greedy, names


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, *names: str, text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OURS = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "braces_merge.json",
        "additional_chat_templates/a.jinja", "chat_template.jinja")  # fmt: skip
OTHERS = ("notes.txt", "model.safetensors.bak", "tokenizer_notes.md", "LICENSE", "deep/er/file", "data.model", ".git/x")


def test_overwriting_replaces_an_export_and_keeps_other_files(tmp_path: Path) -> None:
    """Every file that makes up the earlier export is removed, even if the new export has no such file."""
    out = tmp_path / "out"
    write(out, *OURS, "README.md", text="old")
    write(out, *OTHERS, text="other")
    with new_folder(out, overwrite=True) as folder:
        write(folder, "config.json", "model.safetensors", "README.md", "additional_chat_templates/b.jinja", text="new")
    new = ("config.json", "model.safetensors", "README.md", "additional_chat_templates/b.jinja")
    assert files(out) == dict.fromkeys(OTHERS, "other") | dict.fromkeys(new, "new")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(("existing", "new"), [("README.md/file", "README.md"), ("notes.txt", ".")])
def test_a_failure_changes_nothing(existing: str, new: str, tmp_path: Path) -> None:
    """A folder in the place of a new file; an error while writing."""
    out = tmp_path / "out"
    write(out, *OURS, existing, text="old")
    before = files(out)
    with pytest.raises(BracesError), new_folder(out, overwrite=True) as folder:
        write(folder, "config.json", new, text="new")
    assert files(out) == before
    assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("export", [export_merge, export_code])
@pytest.mark.parametrize("stored", [True, False])
def test_checkpoints_stop_at_the_end_of_a_turn(export, stored, request_, tmp_path):
    """Base models declare another end token, in `generation_config.json` or only in `config.json`."""
    base = shutil.copytree(request_.model, tmp_path / "base")
    if not stored:
        (base / "generation_config.json").unlink()
    session = open_session(str(base), request_.adapter, request_.options)
    ids = torch.tensor([encode(session.base.tokenizer, "the film is").ids])
    expected = greedy(session.base.model, ids)[0].tolist()
    end, length = expected[-1], expected.index(expected[-1], ids.shape[1])
    config = replace(request_.adapter.config, end_of_turn=[session.base.tokenizer.convert_ids_to_tokens(end)])
    adapter = replace(request_.adapter, config=config)
    export(replace(request_, model=str(base), adapter=adapter))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generation_config.eos_token_id == sorted({1, end})
    assert model.generate(ids, max_new_tokens=48)[0].tolist() == expected[: length + 1]
    # The same in Python and `steer`; lm-eval reads the generation config of the model.
    session.add_adapter(adapter)
    text = decode_continuation(session.base.tokenizer, ids[0].tolist(), expected[ids.shape[1] : length])
    assert Model(session).generate("the film is", temperature=0, max_new_tokens=48) == text
    session.remove_adapter()
    assert session.base.model.generation_config.eos_token_id == 1


def copied(source: Path, folder: Path) -> list[str]:
    """Names of the files that are copied from a base."""
    folder.mkdir()
    base = Base(tiny_model(), None, "tiny", checkpoint=source)
    copy_companions(Session(base), folder)
    return names(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("target", ["../secret", "nothing", "/etc/hostname", "../models--owner--other/blobs/x"])
def test_a_link_out_of_the_base_is_refused(tmp_path: Path, name: str, target: str) -> None:
    """To a file next to the base, to nothing, to an absolute path, into the cache of another model."""
    base = tmp_path / "base"
    write(base, "config.json", text="{}")
    write(tmp_path, "secret", "models--owner--other/blobs/x", text="secret")
    link = base / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(Path("..") / target if link.parent != base and target.startswith("..") else target)
    with pytest.raises(ModelError, match="leads out of the model's folder") as caught:
        copied(base, tmp_path / "out")
    assert name in str(caught.value)


def test_links_inside_the_base_are_followed(tmp_path: Path) -> None:
    """Links in the folder, and in the hub's cache, where the folder of a revision links to files next to it."""
    write(tmp_path / "base", "LICENSE.txt", text="free")
    (tmp_path / "base" / "LICENSE").symlink_to("LICENSE.txt")
    assert copied(tmp_path / "base", tmp_path / "out") == ["LICENSE", "LICENSE.txt"]
    cache = tmp_path / "models--owner--name"
    write(cache, "blobs/abc", text="{}")
    revision = cache / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (revision / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "linked").symlink_to(revision)
    for number, folder in enumerate((revision, tmp_path / "linked")):
        assert copied(folder, tmp_path / f"out{number}") == ["tokenizer.json"]


@pytest.mark.parametrize("export", [export_merge, export_code])
def test_a_failed_verification_leaves_the_output_unchanged(export, request_, tmp_path, monkeypatch):
    """Also with --overwrite."""

    def fail(call: list[str], **options: Any) -> None:
        assert Path(call[3], "config.json").is_file()
        raise ModelError("not equal")

    monkeypatch.setattr("braces_cli.export.verify.subprocess.run", fail)
    out = tmp_path / "out"
    write(out, "kept.txt", text="kept")
    with pytest.raises(ModelError, match="not equal"):
        export(replace(request_, overwrite=True))
    assert names(out) == ["kept.txt"]
    assert names(tmp_path) == ["adapter", "out"]


def test_the_working_directory_is_not_an_output(request_, tmp_path, monkeypatch):
    """`--output-dir .` and the folders above: a new folder would take their place."""
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for output, overwrite in ((Path("."), False), (Path("."), True), (Path(".."), True), (here, True)):
        with pytest.raises(ConfigError, match="cannot hold the working directory"):
            export_merge(replace(request_, output=output, overwrite=overwrite))
    assert names(here) == []


def test_a_full_disk_leaves_nothing(braces: Any, adapter_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of files has the effect of a full disk: exit code 1, no traceback, no folder."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = braces("merge", "--adapter", adapter_dir, "--output-dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 1, done.err
    assert "cannot write" in done.err
    assert "Traceback" not in done.err
    assert names(tmp_path) == ["adapter"]
