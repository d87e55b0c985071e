"""Invariants of an adapter on every type of causal language model in transformers; see invariants.py."""

import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.core.architectures import MAPPING, VARIANTS
from tests.core.invariants import EXACT, TABLE, UNTESTED, prove

REWRITE = "recipes/docs/ARCHITECTURES.md is out of date: python -m tests.core.invariants --write"


def rows() -> dict[str, str]:
    """The rows of the table by type."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "| Type |" not in line}


# One of each form of FFN; the others are slow together.
QUICK = {"llama", "gpt2", "bloom", "opt", "phi3", "mixtral", "gpt_oss", "qwen2_moe", "llama4_text", "xlstm", "mamba"}
# Types in transformers and in the table: a release can add and remove types.
TYPES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*MAPPING, *VARIANTS)
    if name in rows()
]


@pytest.mark.parametrize("name", TYPES)
def test_every_model_type_has_the_result_in_the_table(name: str, tmp_path: Path) -> None:
    """Exact, or refused with the reason in the table."""
    outcome = prove(name, tmp_path)
    assert rows().get(name) == outcome.row(), REWRITE


def test_the_table_has_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    """At least 120 types are exact. Types that are only in transformers or only in the table are a warning."""
    found = rows()
    missing, unknown = sorted({*MAPPING, *VARIANTS} - {*found, *UNTESTED}), sorted(set(found) - {*MAPPING, *VARIANTS})
    if missing or unknown:
        warnings.warn(f"types without a row: {missing}; rows without a type: {unknown}. {REWRITE}", stacklevel=1)
    status = {name: row.split("|")[3].strip() for name, row in found.items()}
    types = Counter(kind for name, kind in status.items() if name not in VARIANTS)
    assert types[EXACT] >= 120
    with capsys.disabled():
        print(f"\n{types.total()} model types: " + ", ".join(f"{count} {kind}" for kind, count in types.most_common()))
