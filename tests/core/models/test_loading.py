"""Where a base came from."""

from __future__ import annotations

from pathlib import Path

import pytest

from braces_cli.core.models.loading import checkpoint_folder, commit_of


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A branch moves on; the commit under it is what an adapter was trained on."""
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abc" / "config.json"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(cached))
    folder = checkpoint_folder("owner/name", "main")
    assert commit_of("owner/name", "main", folder) == "0123abc"


def test_a_folder_has_no_commit(model_dir: Path) -> None:
    """What was given as revision is kept as it is."""
    folder = checkpoint_folder(str(model_dir), None)
    assert folder == model_dir
    assert commit_of(str(model_dir), None, folder) is None
