"""The cache of built-in attributes: its key, and cases without caching."""

import os
import shutil

import pytest
import torch

from braces_cli.core.adapter.model import attach, open_session
from braces_cli.core.attributes import lookup
from braces_cli.core.options import LoadOptions


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("BRACES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attributes"


@pytest.fixture
def built(monkeypatch):
    """Names of the attributes that were built instead of read."""
    names, build = [], lookup.built_in_attribute
    monkeypatch.setattr(
        lookup, "built_in_attribute", lambda s, name, *a, **k: names.append(name) or build(s, name, *a, **k)
    )
    return names


def _open(folder, dtype="auto"):
    return open_session(str(folder), None, LoadOptions(device="cpu", dtype=dtype))


def _find(session, **details):
    return lookup.find_attribute(session, "positive", None, **details)


def test_a_second_call_reads_what_the_first_one_built(session, model_dir, cache, built):
    """Bit for bit; with and without a direction are two files."""
    first, again = _find(session), _find(_open(model_dir))
    for part in ("hidden", "reference", "residual", "scale", "direction"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert first.provenance == again.provenance
    assert first.words == again.words
    assert built == ["positive"]
    assert _find(session, for_steering=False).direction is None
    assert built == ["positive"] * 2
    assert len(list(cache.iterdir())) == 2


def test_other_weights_and_another_dtype_have_other_files(model_dir, tmp_path, cache, built):
    """A folder whose files were written again counts as another base, even with the same weights."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    _find(_open(folder), for_steering=False)
    half = _open(folder, "bfloat16")
    _find(half, for_steering=False)
    attach(half.base.model, 2).add_mlp(0)
    _find(half, for_steering=False)  # the float32 parameters of an adapter do not count
    assert len(built) == 2
    os.utime(folder / "model.safetensors", ns=(1, 1))
    _find(_open(folder), for_steering=False)
    assert len(built) == 3
    assert len(list(cache.iterdir())) == 3


def test_weights_that_were_changed_in_memory_have_no_file(model_dir, cache, built):
    """Nothing is read or cached then. An attached adapter is not a change."""
    session = _open(model_dir)
    first = _find(session, for_steering=False)
    files = list(cache.iterdir())
    session.base.model.add_module("part", torch.nn.Linear(2, 2))
    _find(session, for_steering=False)
    assert built == ["positive"]
    with torch.no_grad():
        session.ffns[0].value.weight.mul_(2)
    for _ in range(2):
        assert not torch.equal(_find(session, for_steering=False).hidden, first.hidden)
    assert built == ["positive"] * 3
    assert list(cache.iterdir()) == files


def test_a_damaged_file_is_replaced(session, cache, built):
    first = _find(session, for_steering=False)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(_find(session, for_steering=False).hidden, first.hidden)
    assert torch.equal(_find(session, for_steering=False).hidden, first.hidden)
    assert len(built) == 2


def test_the_least_recently_used_files_are_removed(model_dir, tmp_path, cache, built, monkeypatch):
    """Reading a file counts as use."""
    monkeypatch.setattr(lookup, "_MOST_CACHED", 2)
    sessions = []
    for number in range(3):
        shutil.copytree(model_dir, tmp_path / str(number))
        sessions.append(_open(tmp_path / str(number)))
    for number in (0, 1):
        _find(sessions[number], for_steering=False)
        (new,) = [file for file in cache.iterdir() if file.stat().st_mtime > 1000]
        os.utime(new, (number, number))
    _find(sessions[0], for_steering=False)
    _find(sessions[2], for_steering=False)
    assert len(built) == 3
    _find(sessions[0], for_steering=False)
    assert len(built) == 3
    _find(sessions[1], for_steering=False)
    assert len(built) == 4
    assert len(list(cache.iterdir())) == 2
