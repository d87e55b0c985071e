"""Attributes and their strengths, paired in one place for every command."""

from __future__ import annotations

import pytest

from braces_cli.core.attributes.strengths import pair_strengths
from braces_cli.core.utils.errors import ConfigError


def test_the_kth_strength_belongs_to_the_kth_attribute():
    """None at all means 1; the first of a sweep has none."""
    assert pair_strengths(("a", "b"), (2.0, -1.0)) == {"a": 2.0, "b": -1.0}
    assert pair_strengths(("a", "b"), ()) == {"a": 1.0, "b": 1.0}
    assert pair_strengths((), ()) == {}
    assert pair_strengths(("a", "b", "c"), (2.0, 3.0), first_is_swept=True) == {"b": 2.0, "c": 3.0}
    assert pair_strengths(("a",), (), first_is_swept=True) == {}


@pytest.mark.parametrize(
    ("names", "s", "swept", "message"),
    [
        (["a", "a"], [], False, "named twice"),
        (["a", "a"], [], True, "named twice"),
        (["a"], [1.0, 2.0], False, "2 strengths for 1 attributes"),
        ([], [1.0], False, "1 strengths for 0 attributes"),
        (["a", "b"], [1.0, 2.0], True, "2 strengths for 1 other attributes"),
        (["a"], [float("nan")], False, "no finite number"),
        (["../a"], [], False, "cannot name an attribute"),
    ],
)
def test_what_does_not_fit_is_refused(names, s, swept, message):
    """Rather than cut to the shorter of the two."""
    with pytest.raises(ConfigError, match=message):
        pair_strengths(names, s, first_is_swept=swept)
