"""What a word is in a model's tokens, and how much a vector promotes it. Imports no torch.

    rank, score of a form      mean over its tokens of the token's rank among all tokens and of its score
    rank, score of a word      those of its best form
    rank, score of a concept   mean over its words

Vectors are ordered by rank and, where that is equal, by score. Scores alone would not do: adding a constant to all of a
vector's scores changes nothing that the model says, so a high score may mean no more than a vector whose scores are
high for every token.

The forms of a word are the single tokens that spell it: with and without a space in front, as written and, for a word
in small letters, with a capital. A word that is no single token has one form, the several tokens into which the model's
own tokenizer splits it inside a sentence. A word that begins with a space is that token alone, and `id:123` is the
token with that number.

Vocabulary maps on disk: the tokens of many vectors, written as they are computed and searched without torch.

A map is a Parquet file with the columns layer, index and tokens (a list of {id, token, score}). Its header is JSON in
the schema's metadata: model, fingerprint, side, k, and the texts of all tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.errors import ConfigError, DataError, ModelError, near_misses
from braces_cli.core.files import write_atomic
from braces_cli.core.models.stored_fingerprint import Fingerprint
from braces_cli.core.schema import Count, Kind, check, parse
from braces_cli.core.text import whole_number

Form = tuple[int, ...]


@dataclass(frozen=True)
class Concept:
    """Words to look for: for each word the token sequences that count as it."""

    words: tuple[str, ...]
    forms: tuple[tuple[Form, ...], ...]

    @property
    def tokens(self) -> list[int]:
        """Every token of every form, in order of their numbers."""
        return sorted({token for forms in self.forms for form in forms for token in form})

    def measure(self, tokens: Mapping[int, tuple[float, float]]) -> tuple[float, float]:
        """(rank, score) of the concept for a vector with these (rank, score) of its tokens."""
        words = []
        for forms in self.forms:
            means = [tuple(sum(tokens[t][part] for t in form) / len(form) for part in (0, 1)) for form in forms]
            words.append(min(means, key=lambda mean: (mean[0], -mean[1])))
        rank, score = (sum(word[part] for word in words) / len(words) for part in (0, 1))
        return (int(rank) if rank == int(rank) else rank), score


def best_first(row: Mapping[str, Any]) -> tuple[float, float, int, int]:
    """Sorts rows of found vectors, best first."""
    return row["rank"], -row["score"], row["layer"], row["index"]


class Vocabulary:
    """Texts of all tokens, and which tokens have a text."""

    def __init__(self, texts: Sequence[str]) -> None:
        # Looked through for each word: a dictionary of lists would take longer to build than a search of a map.
        self.texts = texts

    def find(self, text: str) -> list[int]:
        """Tokens that read `text` exactly, lowest first."""
        found: list[int] = []
        with suppress(ValueError):  # there is none, or no further one
            while text:
                found.append(self.texts.index(text, found[-1] + 1 if found else 0))
        return found

    def number(self, text: str, where: str) -> int | None:
        """The token that `id:123` names, None for any other text.

        Raises:
            ConfigError: a number beyond the vocabulary, or none behind an `id:` that is no token either.
        """
        if not text.startswith("id:"):
            return None
        token = whole_number(text.removeprefix("id:"))
        if token is None and self.find(text):
            return None
        if token is None or token >= len(self.texts):
            what = f"no token {text.removeprefix('id:')}"
            raise ConfigError(what, where=where, hint=f"There is id:0 to id:{len(self.texts) - 1}.")
        return token

    def single(self, text: str, where: str) -> int:
        """One token for `text`: the one with a space in front, as words inside a sentence have, else as written.

        Raises:
            ConfigError: it is no single token.
        """
        number = self.number(text, where)
        if number is not None:
            return number
        spaced = [] if text.startswith(" ") else self.find(f" {text}")
        for token in (*spaced, *self.find(text)):
            return token
        raise self.unknown(text, where)

    def unknown(self, text: str, where: str) -> ConfigError:
        """The error for a text that is no token here, with near ones named."""
        same = [t for t in self.texts if t.strip()[:1].lower() == text.strip()[:1].lower()] if text.strip() else []
        close = near_misses(text.strip(), dict.fromkeys(t.strip() for t in same))
        hint = close or "Give a text that is one token, or id:NUMBER."
        return ConfigError(f"`{text}` is no token of this model", where=where, hint=hint)


def concept(
    words: Sequence[str], vocabulary: Vocabulary, split: Callable[[str], Sequence[int]], where: str = "TOKEN"
) -> Concept:
    """The tokens of some words.

    Args:
        split: the tokenizer's tokens of a word inside a sentence; asked only for words that are no single token.

    Raises:
        ConfigError: no words, or one that cannot be written in this vocabulary.
    """
    if not words:
        raise ConfigError("nothing to look for", where=where, hint="Give a word, several words, or --attribute NAME.")
    return Concept(tuple(words), tuple(_forms(word, vocabulary, split, where) for word in words))


def _forms(
    word: str, vocabulary: Vocabulary, split: Callable[[str], Sequence[int]], where: str
) -> tuple[tuple[int, ...], ...]:
    number = vocabulary.number(word, where)
    if number is not None:
        return ((number,),)
    spellings = [word] if word.startswith(" ") else [f" {word}", word]
    if word == word.lower() and not word.startswith(" "):
        spellings += [f" {word.capitalize()}", word.capitalize()]
    singles = dict.fromkeys(token for spelling in spellings for token in vocabulary.find(spelling))
    if singles:
        return tuple((token,) for token in singles)
    pieces = tuple(split(word.strip())) if word.strip() else ()
    if not pieces:
        raise vocabulary.unknown(word, where)
    return (pieces,)


_KEY = b"braces"
_ROWS_AT_ONCE = 8192
_TOKEN_COLUMNS = (("id", "int32"), ("score", "float32"))
_HINT = "`braces inspect values --output FILE` writes maps."


class Header(TypedDict):
    """What a map says of itself; see `vector_tokens.map_header`."""

    format_version: int
    model: str
    revision: NotRequired[str | None]
    fingerprint: Fingerprint
    tokenizer: NotRequired[dict[str, str | None] | None]
    side: str
    top_k: Count
    vocabulary: list[str]


_ANY_HEADER = Kind(dict[str, Any], DataError, _HINT, "map of value vectors")
_HEADER = Kind(Header, DataError, _HINT)


def check_suffix(path: Path, where: str) -> None:
    """Raises:
    ConfigError: the name does not end in .parquet.
    """
    if path.suffix != ".parquet":
        hint = "End it in .parquet; for JSON Lines leave --output out and add --format json."
        raise ConfigError(f"unknown kind of file `{path.name}`", where=where, hint=hint)


def write_map(path: Path, header: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> int:
    """Write a map atomically; returns its number of vectors. Memory: 8,192 rows."""
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    def complete(temporary: Path) -> bool:
        written = open_map(temporary)
        return written.header == dict(header) and written.vectors() == count

    write_atomic(path, lambda temporary: _write_parquet(temporary, header, counted()), complete)
    return count


def _schema(header: Mapping[str, Any] | None = None) -> Any:
    import pyarrow as pa

    token = pa.struct([("id", pa.int32()), ("token", pa.string()), ("score", pa.float32())])
    schema = pa.schema([("layer", pa.int32()), ("index", pa.int32()), ("tokens", pa.list_(token))])
    return schema if header is None else schema.with_metadata({_KEY: json.dumps(header, ensure_ascii=False).encode()})


def _write_parquet(path: Path, header: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(header)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while block := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))


def _numbers(column: Any, kind: str) -> Any:
    """A pyarrow column without nulls as a numpy array over its own memory."""
    import numpy as np

    if column.null_count:
        raise ValueError("a number is missing")
    values = np.frombuffer(column.buffers()[1], dtype=kind) if len(column) else np.empty(0, kind)
    return values[column.offset : column.offset + len(column)]


@dataclass(frozen=True)
class Map:
    """An open map.

    Attributes:
        header: see `vector_tokens.map_header`.
    """

    path: Path
    header: dict[str, Any]

    def vectors(self) -> int:
        """Number of vectors in it."""
        import pyarrow.parquet as pq

        return int(pq.read_metadata(self.path).num_rows)

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.header["vocabulary"])

    def rows(self, tokens: list[int]) -> Iterator[dict[str, Any]]:
        """The rows that list one of `tokens`, in order.

        Raises:
            DataError: the file is damaged.
        """
        try:
            yield from self._rows(tokens)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise _damaged(self.path, error) from error

    def _rows(self, tokens: list[int]) -> Iterator[dict[str, Any]]:
        # Columns are read through their buffers: pyarrow.compute, and pandas, which pyarrow imports for conversions
        # where it is installed, would take longer to import than the whole search takes; so does numpy.ma, which
        # np.unique imports.
        import numpy as np
        import pyarrow.parquet as pq

        # The texts stand in the header, too, so that column need not be read.
        columns = ["layer", "index", "tokens.list.element.id", "tokens.list.element.score"]
        texts = self.header["vocabulary"]
        for batch in pq.ParquetFile(self.path).iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            layers, indices, listed = batch.columns
            offsets = _numbers(listed.offsets, "int32")
            ids, scores = (_numbers(listed.values.field(name), kind) for name, kind in _TOKEN_COLUMNS)
            places = np.flatnonzero(np.logical_or.reduce([ids == token for token in tokens]))
            for row in dict.fromkeys((np.searchsorted(offsets, places, side="right") - 1).tolist()):
                inside = slice(int(offsets[row]), int(offsets[row + 1]))
                pairs = zip(ids[inside].tolist(), scores[inside].tolist(), strict=True)
                yield {
                    "layer": layers[row].as_py(),
                    "index": indices[row].as_py(),
                    "tokens": [{"id": token, "token": texts[token], "score": score} for token, score in pairs],
                }


def open_map(path: Path) -> Map:
    """Read the header of a map.

    Raises:
        ConfigError: no such file.
        DataError: not a map.
    """
    if not os.path.isfile(path):  # pathlib's would raise where the folder is closed
        raise ConfigError("no such map", where=str(path), hint="`braces inspect values --output FILE` writes one.")
    import pyarrow.parquet as pq

    try:
        # Not `read_schema`, which decodes the copy of the header in Arrow's own schema, too.
        text = pq.read_metadata(path).metadata[_KEY]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error
    header = parse(_ANY_HEADER, text, str(path))
    check(_HEADER, header, str(path))
    return Map(path, header)


def _damaged(path: Path, error: Exception) -> DataError:
    words = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return DataError(f"not a map of value vectors ({words})", where=str(path), hint=_HINT)


def check_model(source: Map, fingerprint: Mapping[str, Any], tokenizer: dict[str, Any] | None = None) -> None:
    """Check that a map belongs to a model.

    Raises:
        ModelError: it was made for another one.
    """
    from braces_cli.core.models.identity import differences

    words = [part.replace("adapter ", "map ") for part in differences(source.header["fingerprint"], fingerprint)]
    vocabulary = (source.header.get("tokenizer") or {}).get("vocabulary")
    if not words and tokenizer and vocabulary and vocabulary != tokenizer.get("vocabulary"):
        words = ["another vocabulary"]
    if words:
        hint = (
            f"It was made for {source.header['model']}; make one for this model: braces inspect values --output FILE."
        )
        raise ModelError(f"this map was made for another model ({'; '.join(words)})", where=str(source.path), hint=hint)


def search(source: Map, requested: Concept, limit: int, layers: list[int] | None = None) -> list[dict[str, Any]]:
    """Rows `{layer, index, rank, score, tokens}` of the vectors that promote a concept most, best first.

    Only vectors that list one of its tokens among their k best can be found. Of a concept of several tokens one that
    is not listed counts as ranked k + 1 with the last score listed, the best it can have.
    """
    rows = []
    for row in source.rows(requested.tokens):
        if layers is None or row["layer"] in layers:
            listed = {t["id"]: (place, t["score"]) for place, t in enumerate(row["tokens"], 1)}
            missing = (len(row["tokens"]) + 1, row["tokens"][-1]["score"])
            rank, score = requested.measure({token: listed.get(token, missing) for token in requested.tokens})
            rows.append({"layer": row["layer"], "index": row["index"], "rank": rank, "score": score} | row)
    rows.sort(key=best_first)
    return rows[:limit]


def splitter(source: Map) -> Callable[[str], list[int]]:
    """Tokens of a word by the tokenizer of the map's model, where its folder is here; read only when asked.

    Raises (the function that is returned):
        ConfigError: the tokenizer is not here.
    """

    def split(word: str) -> list[int]:
        path = Path(source.header["model"]) / "tokenizer.json"
        if not path.is_file():
            hint = "Its tokenizer is not here to split it: give --model, or another word."
            raise ConfigError(f"`{word}` is no single token of the map's model", where="TOKEN", hint=hint)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        found = tokenizer.encode(word, add_special_tokens=False)
        if not (found.tokens and found.tokens[0].startswith(("▁", "Ġ"))):
            found = tokenizer.encode(f" {word}", add_special_tokens=False)
        return list(found.ids) if tokenizer.decode(found.ids).strip() == word else []

    return split
