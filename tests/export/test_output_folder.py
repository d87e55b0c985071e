"""The folder of an export: what of an earlier one goes, what of others stays; links of a base that lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from braces_cli.core.errors import BracesError, ModelError
from braces_cli.export.checkpoint import companions, new_folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, *names: str, text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


OURS = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "braces_merge.json",
        "additional_chat_templates/a.jinja", "chat_template.jinja")  # fmt: skip
OTHERS = ("notes.txt", "model.safetensors.bak", "tokenizer_notes.md", "LICENSE", "deep/er/file", "data.model", ".git/x")


def test_overwriting_keeps_files_of_others(tmp_path: Path) -> None:
    """What an earlier export is loaded by goes, whether the new one has it or not; everything else stays."""
    out = tmp_path / "out"
    write(out, *OURS, "README.md", text="old")
    write(out, *OTHERS, text="of others")
    with new_folder(out, overwrite=True) as folder:
        write(folder, "config.json", "model.safetensors", "README.md", "additional_chat_templates/b.jinja", text="new")
    new = ("config.json", "model.safetensors", "README.md", "additional_chat_templates/b.jinja")
    assert files(out) == dict.fromkeys(OTHERS, "of others") | dict.fromkeys(new, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_in_the_way_of_a_file_is_found_before_anything_changes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, *OURS, "README.md/file", text="old")
    before = files(out)
    with pytest.raises(BracesError, match="directory"), new_folder(out, overwrite=True) as folder:
        write(folder, "config.json", "README.md", text="new")
    assert files(out) == before


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, *OURS, *OTHERS, text="old")
    before = files(out)
    with pytest.raises(BracesError), new_folder(out, overwrite=True) as folder:
        write(folder, "config.json", ".", text="new")
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/a.jinja", "vocab.txt"])
@pytest.mark.parametrize("target", ["../secret", "nothing", "/etc/hostname", "../models--owner--other/blobs/x"])
def test_a_link_out_of_the_base_is_refused(tmp_path: Path, name: str, target: str) -> None:
    """To a file beside it, to nothing, to an absolute path, into the cache of another model; in a subfolder, too."""
    base = tmp_path / "base"
    write(base, "config.json", text="{}")
    write(tmp_path, "secret", "models--owner--other/blobs/x", text="secret")
    link = base / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(Path("..") / target if link.parent != base and target.startswith("..") else target)
    with pytest.raises(ModelError, match="leads out of the model's folder") as caught:
        companions(base)
    assert name in str(caught.value)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """There a revision's folder holds links to files beside it; a folder that is reached through a link will do."""
    cache = tmp_path / "models--owner--name"
    write(cache, "blobs/abc", text="{}")
    revision = cache / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (revision / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "linked").symlink_to(revision)
    for folder in (revision, tmp_path / "linked"):
        assert [path.name for path in companions(folder)] == ["tokenizer.json"]
    write(tmp_path, "secret", text="secret")
    (revision / "LICENSE").symlink_to("../../../secret")
    with pytest.raises(ModelError, match="leads out"):
        companions(revision)


def test_links_inside_a_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "LICENSE.txt", text="free")
    (tmp_path / "LICENSE").symlink_to("LICENSE.txt")
    assert [path.name for path in companions(tmp_path)] == ["LICENSE", "LICENSE.txt"]
