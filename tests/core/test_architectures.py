"""Every type of causal language model that transformers knows, held to the laws of an adapter; see laws.py."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

from braces_cli.cli.main import main
from tests.conftest import tiny_tokenizer
from tests.core.architectures import MAPPING, VARIANTS, model_type, tiny
from tests.core.invariants import EXACT, TABLE, UNTESTED, prove

REWRITE = "recipes/docs/ARCHITECTURES.md is out of date: python -m tests.core.invariants --write"


def rows() -> dict[str, str]:
    """The rows of the table by type."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "| Type |" not in line}


# One of each kind of feed-forward layer; the others are slow by their number.
QUICK = {"llama", "gemma3_text", "gpt2", "bloom", "opt", "phi3", "mixtral", "gpt_oss", "xlstm", "mamba"}
# A release of transformers may add and remove types: only those that both it and the table know are tested.
TYPES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*MAPPING, *VARIANTS)
    if name in rows()
]


@pytest.mark.parametrize("name", TYPES)
def test_every_model_type_is_what_the_table_says(name: str, tmp_path: Path) -> None:
    """Attach, equal the reference, generate, save, load, detach; or be refused for the reason given."""
    outcome = prove(name, tmp_path)
    assert rows().get(name) == outcome.row(), REWRITE


def test_the_table_leaves_out_no_type(capsys: pytest.CaptureFixture[str]) -> None:
    """At least 120 types are exact. Types that only transformers or only the table knows are a warning."""
    found = rows()
    missing, unknown = sorted({*MAPPING, *VARIANTS} - {*found, *UNTESTED}), sorted(set(found) - {*MAPPING, *VARIANTS})
    if missing or unknown:
        warnings.warn(f"types without a row: {missing}; rows without a type: {unknown}. {REWRITE}", stacklevel=1)
    status = {name: row.split("|")[3].strip() for name, row in found.items()}
    types = Counter(kind for name, kind in status.items() if name not in VARIANTS)
    assert types[EXACT] >= 120
    with capsys.disabled():
        print(f"\n{types.total()} model types: " + ", ".join(f"{count} {kind}" for kind, count in types.most_common()))


def test_a_type_without_ffn_exits_4_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says that there is nothing to attach to, and what was looked for."""
    tiny("mamba").save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    (tmp_path / "rows.jsonl").write_text('{"text": "a happy day"}\n')
    arguments = ["--model", tmp_path / "mamba", "--data", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in ("train", *arguments)])
    assert caught.value.code == 4
    errors = [line for line in capsys.readouterr().err.splitlines() if "Mamba" in line]
    assert "MambaForCausalLM has no feed-forward layer, and braces attaches to nothing else" in errors[0]
    assert not (tmp_path / "out").exists()


def test_variants_are_of_known_types() -> None:
    """A variant is named after its type."""
    assert all(model_type(name) in MAPPING for name in VARIANTS)
