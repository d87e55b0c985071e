"""JSON and YAML: any text is a plain value, or malformed, and nothing else."""

from __future__ import annotations

import json

import pytest

from braces_cli.core.utils.decoding import DEPTH, Malformed, decode, decode_yaml
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import JSON_TEXT, YAML_TEXT

PLAIN = (dict, list, str, int, float, bool, type(None))
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def depth(value: object) -> int:
    level, found = [value], 0
    while level := [item for item in level if isinstance(item, (dict, list))]:
        found += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return found


def check_plain(value: object) -> None:
    """Values of plain types, no deeper than allowed, without half characters."""
    assert isinstance(value, PLAIN)
    assert depth(value) <= DEPTH
    for item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        check_plain(item[0])
        check_plain(item[1])
    if isinstance(value, str):
        value.encode()


@fuzz(
    JSON_TEXT,
    examples=(("[" * 100_000,), ('{"a":' * 100_000,), ("9" * 5000,), ('{"a": 1, "a": 2}',), ('"\\ud8"',)),
)
def test_json_is_a_value_or_malformed(text: str) -> None:
    value, error = attempt(lambda: decode(text), Malformed)
    if error:
        assert error.message
        assert "\n" not in error.message
        return
    check_plain(value)
    assert value == json.loads(text)
    json.dumps(value, allow_nan=False)


@fuzz(JSON_TEXT, examples=(("NaN",), ("1e999",)))
def test_json_of_other_programs_is_a_value_or_malformed(text: str) -> None:
    for flags in ({"constants": True}, {"foreign": True}):
        assert depth(attempt(lambda flags=flags: decode(text, **flags), Malformed)[0]) <= DEPTH


@fuzz(
    YAML_TEXT,
    examples=(
        (BOMB,), ("a: &a [*a]\n",), ("data: " + "[" * 3000,), ("a: 1\na: 2\n",), ("? [a]\n: b\n",),
        ("m: !!python/object/apply:os.getpid []\n",), ("m: 2020-13-45\n",), ("m: !!binary ====\n",),
        (f"seed: {'9' * 5000}\n",), ('m: "a\\uD800b"\n',), ("a: &a {b: 1}\n<<: *a\n",), ("1: 2\n",),
    ),
)  # fmt: skip
def test_yaml_is_a_value_or_malformed(text: str) -> None:
    value, error = attempt(lambda: decode_yaml(text), Malformed)
    assert error is None or error.message
    check_plain(value)


@pytest.mark.parametrize("text", [BOMB, "a: !!python/name:os.system\n", "a: 1\na: 2\n", f"a: {'[' * 60}{']' * 60}\n"])
def test_yaml_that_must_be_refused(text: str) -> None:
    with pytest.raises(Malformed):
        decode_yaml(text)
