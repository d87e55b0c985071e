"""Scratch folders: gone at the end, after a kill with the next one, and never while somebody uses them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from braces_cli.core.files import PREFIX, scratch_folder

_HOLDER = """
import time
from braces_cli.core.files import scratch_folder
with scratch_folder() as folder:
    (folder / "tensors").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_killed_process_leaves_its_folder_to_the_next(temporary: Path) -> None:
    """While the process lives its folder stays; what has another name, or is no folder, is none of ours."""
    strangers = [temporary / "braces-other", temporary / f"{PREFIX}file"]
    strangers[0].mkdir()
    strangers[1].touch()
    (temporary / f"{PREFIX}link").symlink_to(strangers[0])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    call = [sys.executable, "-c", _HOLDER]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        try:
            folder = Path(holder.stdout.readline().strip())
            with scratch_folder() as other:
                assert (folder / "tensors").exists()
                assert other != folder
        finally:
            holder.kill()
    assert (folder / "tensors").exists()
    with scratch_folder() as other:
        assert not folder.exists()
        assert other.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in temporary.iterdir()} == {"braces-other", f"{PREFIX}file", f"{PREFIX}link"}


def test_a_folder_is_gone_whatever_ends_its_use(temporary: Path) -> None:
    """An exception too; two at once in one process do not take each other's."""
    with scratch_folder() as one, scratch_folder() as two:
        assert one.is_dir()
        assert two.is_dir()
    with pytest.raises(KeyboardInterrupt), scratch_folder():
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []
