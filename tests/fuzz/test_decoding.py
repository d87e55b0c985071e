"""JSON and YAML: any text is a plain value, or malformed, and nothing else."""

from __future__ import annotations

import json

from braces_cli.core.schema import Malformed, decode, decode_yaml
from tests.fuzz.budget import attempt, fuzz
from tests.fuzz.inputs import JSON_TEXT, YAML_TEXT

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@fuzz(
    JSON_TEXT,
    examples=(("[" * 100_000,), ('{"a":' * 100_000,), ("9" * 5000,), ('{"a": 1, "a": 2}',), ('"\\ud8"',), ("NaN",)),
)
def test_json_is_a_value_or_malformed(text: str) -> None:
    value, error = attempt(lambda: decode(text), Malformed)
    if error:
        assert error.message
        assert "\n" not in error.message
        return
    json.dumps(value, ensure_ascii=False).encode()


@fuzz(
    YAML_TEXT,
    examples=(
        (BOMB,), ("a: &a [*a]\n",), ("data: " + "[" * 3000,), ("a: 1\na: 2\n",), ("? [a]\n: b\n",),
        ("m: !!python/object/apply:os.getpid []\n",), ("m: 2020-13-45\n",), ("m: !!binary ====\n",),
        (f"seed: {'9' * 5000}\n",), ('m: "a\\uD800b"\n',), ("a: &a {b: 1}\n<<: *a\n",), ("1: 2\n",),
        ("m: !!int x\n",), ("m: !!timestamp x\n",), ("m: !!set {a, b}\n",),
    ),
)  # fmt: skip
def test_yaml_is_a_value_or_malformed(text: str) -> None:
    _, error = attempt(lambda: decode_yaml(text), Malformed)
    assert error is None or error.message
