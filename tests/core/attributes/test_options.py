"""Options of attributes: a mistyped `--attributes DIR` is an error of every command; lists of strengths."""

import pytest

from braces_cli.core.attributes.options import AttributeSettings, parse_strengths
from braces_cli.core.config import build
from braces_cli.core.errors import ConfigError


def test_a_folder_without_attributes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        build(AttributeSettings, {"attributes": tmp_path / "attrs"})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot read this folder"):
        build(AttributeSettings, {"attributes": tmp_path / "file"})
    with pytest.raises(ConfigError, match="no attribute file"):
        build(AttributeSettings, {"attributes": tmp_path})
    (tmp_path / "warm.safetensors").touch()
    assert build(AttributeSettings, {"attributes": tmp_path}).attributes == tmp_path


def test_strengths():
    """Both ends are included, 0 is exact, and rounding errors do not add up."""
    assert parse_strengths("-0.3:0.3:0.1") == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert parse_strengths("2:-2:-2") == [2.0, 0.0, -2.0]
    assert parse_strengths("-4:4:3") == [-4.0, -1.0, 2.0]
    assert parse_strengths("3,0,-1.5,0") == [3.0, 0.0, -1.5]
