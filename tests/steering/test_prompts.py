"""Prompts from streams and files."""

import io
import json
import os
from pathlib import Path

import pytest

from braces_cli.core.errors import DataError
from braces_cli.steering import prompts
from braces_cli.steering.prompts import count_prompts, read_prompt_rows, read_prompts


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_a_line_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of the maximum length is read."""
    monkeypatch.setattr(prompts, "LONGEST", 1000)
    with open("/dev/zero", encoding="utf-8") as stream, pytest.raises(DataError, match="a line of more than 1,000"):
        next(read_prompts((), None, stream))
    longest = "x" * 999 + "\n"
    assert list(read_prompts((), None, io.StringIO(f"{longest}\n{longest}"))) == ["x" * 999] * 2
    with pytest.raises(DataError, match="more than") as caught:
        list(read_prompts((), None, io.StringIO(f"a\n{'x' * 1001}\n")))
    assert caught.value.where == "standard input:2"


ROWS = [{"prompt": "The film", "attributes": {"positive": 2.0}}, {"prompt": "It was, in\nthe end,", "attributes": None}]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".parquet"])
def test_rows_of_a_table(tmp_path: Path, suffix: str) -> None:
    """In CSV and TSV, `attributes` is JSON."""
    import pandas

    path = tmp_path / f"prompts{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        texts = [{**row, "attributes": json.dumps(row["attributes"]) if row["attributes"] else None} for row in ROWS]
        frame = pandas.DataFrame(ROWS if suffix == ".parquet" else texts)
        if suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    read = list(read_prompt_rows((), path, io.StringIO()))
    assert [(row.text, row.attributes) for row in read] == [(row["prompt"], row["attributes"]) for row in ROWS]
    assert count_prompts(path) == 2


def test_a_table_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("text,label\nThe film,positive\n")
    with pytest.raises(DataError, match="no `prompt` with text \\(keys found: text, label\\)"):
        list(read_prompts((), path, io.StringIO()))
