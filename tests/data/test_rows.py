"""Rows of every kind of file, their formats and columns, and plain texts."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from braces_cli.core.errors import ConfigError, DataError
from braces_cli.data.rows import Source, parse_columns, parts, read_format, read_rows, read_texts

ROWS = [{"prompt": "the film", "completion": " is good"}, {"prompt": "a, day", "completion": ' is "sad"\nbad'}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".TSV", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    """Including commas, quotes and line breaks in values, and long values."""
    rows = [*ROWS, {"prompt": "word " * 30_000, "completion": ""}]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert [row.fields for row in read_rows(str(path))] == rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name-2.5", ("owner/name-2.5", None, "train")),
        ("owner/name:part-v1.0:validation", ("owner/name", "part-v1.0", "validation")),
        ("owner/name:train[:10%]+test[-5:]", ("owner/name", None, "train[:10%]+test[-5:]")),
        ("owner/name:part:train[2:10]", ("owner/name", "part", "train[2:10]")),
    ],
)
def test_names_of_hub_sets(monkeypatch, name, expected):
    """Ids and subsets with dots, and slices of splits."""
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, split, **_: asked.append((*args, split)) or [{"x": 1}])
    assert [row.fields for row in read_rows(name)] == [{"x": 1}]
    assert asked == [expected]


def test_a_repeated_column_of_parquet_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are named `text`"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_json_texts_of_parquet_are_values(tmp_path):
    """The type `Json` of `datasets`, at every depth; text that looks like JSON stays text."""

    def json_array(*values):
        return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(values))

    values = json_array('{"x": [1]}', "null")
    columns = {
        "list": pyarrow.ListArray.from_arrays([0, 1, 2], values),
        "object": pyarrow.StructArray.from_arrays([values], names=["inner"]),
        "text": pyarrow.array(["{}", None]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert [row.fields for row in read_rows(str(tmp_path / "a.parquet"))] == [
        {"list": [{"x": [1]}], "object": {"inner": {"x": [1]}}, "text": "{}"},
        {"list": [None], "object": {"inner": None}, "text": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message", "place"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "broken JSON", ":2"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', "must be an object", ":2"),
        ("a.jsonl", "", "the file is empty", ""),
        ("a.jsonl", "\n \n", "no rows", ""),
        ("a.json", '[{"text": "x"},\n\n {"text" "y"}]', "broken JSON", ":3"),
        ("a.json", '["x"]', "must be an object", ", row 1"),
        ("a.json", '{"text": "x"}\n{"text": \n', "broken JSON", ":2"),
        ("a.csv", "prompt,completion\na,b\nc\n", "another number of cells", ":3"),
        ("a.csv", "prompt,completion\na,b,c\n", "another number of cells", ":2"),
        ("a.csv", "text,text\na,b\n", "two columns are named `text`", ":1"),
        ("a.docx", "hello", "cannot read `.docx` files", ""),
        ("a.parquet", "hello", "broken Parquet", ""),
        ("a.jsonl", '{"text": "\u00e9"}', "not UTF-8", ""),
        ("none.jsonl", None, "no such file", ""),
        ("", None, "a folder, not a file", ""),
    ],
)
def test_errors_have_a_location(tmp_path, name, content, message, place):
    """File and line, if the format has lines."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(path)))
    assert caught.value.where == f"{path}{place}"


def read(fields, columns=()):
    kind, values = read_format(Source(fields, "a.jsonl:7"), parse_columns(columns).content)
    return parts(kind, values, "a.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "x", "label": 1}, ("x", None)),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"instruction": "do", "input": "", "output": "done"}, ("### Instruction:\ndo\n\n### Response:\n", "done")),
        ({"instruction": "do", "output": "done", "answer": "d"}, ("### Instruction:\ndo\n\n### Response:\n", "done")),
        (
            {"instruction": "do", "input": "this", "output": "done"},
            ("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n", "done"),
        ),
        # Columnar files give every row every column.
        ({"text": None, "prompt": "p", "completion": "c", "messages": None}, ("p", "c")),
    ],
)
def test_format_follows_from_keys(fields, expected):
    assert read(fields) == expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt=question,completion=answer"], ("q", "a")),
        (["prompt=question", "completion=answer"], ("q", "a")),
        (["text=answer"], ("a", None)),
        (["instruction=question,output=answer"], ("### Instruction:\nq\n\n### Response:\n", "a")),
        (["instruction=question,input=text,output=answer"], read({"instruction": "q", "input": "t", "output": "a"})),
    ],
)
def test_columns_take_precedence_over_keys(columns, expected):
    assert read({"question": "q", "answer": "a", "text": "t"}, columns) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prompt", "is not KEY=COLUMN"),
        ("prompt=", "is not KEY=COLUMN"),
        ("promt=question,completion=answer", "no format has a key `promt`"),
        ("prompt=a,prompt=b", "named twice"),
        ("prompt=question", "prompt is not a complete format"),
        ("prompt=a,completion=b,text=c", "is not a complete format"),
    ],
)
def test_invalid_columns(value, message):
    """ConfigError before any file is opened."""
    with pytest.raises(ConfigError, match=message):
        parse_columns([value])


@pytest.mark.parametrize(
    ("fields", "columns", "message"),
    [
        ({"question": "x", "answer": "y"}, [], "none of the needed fields .keys found: question, answer."),
        ({"text": 3}, [], "`text` must be text, not int"),
        ({"text": None}, [], "`text` must be text, not NoneType"),
        ({"prompt": "p", "completion": None}, [], "`completion` must be text, not NoneType"),
        ({"text": "x", "prompt": "p", "completion": "c"}, [], "fit 2 formats: text, prompt/completion"),
        ({"question": "x"}, ["text=answer"], "no column `answer` .keys found: question."),
    ],
)
def test_ambiguous_rows(fields, columns, message):
    """DataError with the location."""
    with pytest.raises(DataError, match=message) as caught:
        read(fields, columns)
    assert caught.value.where == "a.jsonl:7"


def test_columns_of_attribute_and_strength():
    found = parse_columns(["text=review,attribute=mood", "strength=how"])
    assert (found.content, found.attribute, found.strength) == ({"text": "review"}, "mood", "how")


def test_lines_of_a_plain_file(tmp_path):
    """Without blank lines; form feeds and spaces are kept. As rows they have the key `text`."""
    path = tmp_path / "t.txt"
    path.write_text("one\n\n two words \na\fb\n")
    assert read_texts(path) == ["one", " two words ", "a\fb"]
    assert [row.fields for row in read_rows(str(path))] == [{"text": text} for text in read_texts(path)]


def test_texts_of_a_data_file(tmp_path):
    """Rows of any format, prompt and completion as one text; or one column."""
    path = tmp_path / "t.jsonl"
    write(path, [{"prompt": "a ", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    assert read_texts(path) == ["a b", "cd"]
    assert read_texts(path, field="prompt") == ["a ", "c"]
    with pytest.raises(DataError, match="no text in `text`"):
        read_texts(path, field="text")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"\n \n", "all texts are blank"), (b"\xff\n", "not UTF-8")]
)
def test_files_without_texts(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(path)
