"""Vocabulary maps on disk, and the search for a concept in them. Imports no torch.

A map is a Parquet file with the columns layer, index and tokens (a list of {id, token, score}); its header is JSON in
the metadata of the schema. A concept is a list of words, a word has one or more forms, a form is a sequence of tokens:

    rank, score of a form      mean over its tokens of the token's rank among all tokens and of its score
    rank, score of a word      those of its best form
    rank, score of a concept   mean over its words

Vectors are ordered by rank, then by score. The score alone does not compare vectors: adding a constant to all scores of
a vector does not change the probabilities of the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from braces_cli.core.errors import ConfigError, DataError, ModelError, near_misses
from braces_cli.core.files import write_atomic
from braces_cli.core.models.identity import Fingerprint
from braces_cli.core.schema import Count, Kind, parse

_KEY = b"braces"
_ROWS_AT_ONCE = 8192
_HINT = "`braces inspect values --output FILE` writes maps."


class Vocabulary:
    """Texts of all tokens, and the tokens that have a text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def find(self, text: str) -> list[int]:
        """Tokens with exactly this text, lowest first."""
        # A linear search: building a dictionary of all texts would take longer than the search of a map.
        found: list[int] = []
        with suppress(ValueError):
            while text:
                found.append(self.texts.index(text, found[-1] + 1 if found else 0))
        return found

    def number(self, text: str, where: str) -> int | None:
        """Return the token named by `id:123`, None for any other text.

        Raises:
            ConfigError: the number is invalid or outside the vocabulary.
        """
        if not text.startswith("id:"):
            return None
        digits = text.removeprefix("id:")
        token = int(digits) if re.fullmatch("[0-9]{1,18}", digits) else None
        if token is None and self.find(text):
            return None
        if token is None or token >= len(self.texts):
            hint = f"The tokens are id:0 to id:{len(self.texts) - 1}."
            raise ConfigError(f"no token {text.removeprefix('id:')}", where=where, hint=hint)
        return token

    def single(self, text: str, where: str) -> int:
        """Return one token for `text`: with a leading space, as inside a sentence, else as written.

        Raises:
            ConfigError: no token has this text.
        """
        number = self.number(text, where)
        if number is not None:
            return number
        found = [] if text.startswith(" ") else self.find(f" {text}")
        found += self.find(text)
        if not found:
            raise self._unknown(text, where)
        return found[0]

    def concept(self, words: Sequence[str], split: Callable[[str], Sequence[int]], where: str = "TOKEN") -> Concept:
        """Return the tokens of some words.

        The forms of a word are the single tokens that spell it: with and without a leading space, as written and, if
        it is in lower case, capitalised. A word without such a token has one form, the tokens that the tokenizer
        splits it into. A word with a leading space is that token alone, `id:123` the token with that number.

        Args:
            split: tokenizer, for a word inside a sentence; called only for words that are not single tokens.

        Raises:
            ConfigError: this vocabulary cannot express a word.
        """
        return Concept(tuple(self._forms(word, split, where) for word in words))

    def _forms(self, word: str, split: Callable[[str], Sequence[int]], where: str) -> tuple[tuple[int, ...], ...]:
        number = self.number(word, where)
        if number is not None:
            return ((number,),)
        spellings = [word] if word.startswith(" ") else [f" {word}", word]
        if word == word.lower() and not word.startswith(" "):
            spellings += [f" {word.capitalize()}", word.capitalize()]
        singles = dict.fromkeys(token for spelling in spellings for token in self.find(spelling))
        if singles:
            return tuple((token,) for token in singles)
        pieces = tuple(split(word.strip())) if word.strip() else ()
        if not pieces:
            raise self._unknown(word, where)
        return (pieces,)

    def _unknown(self, text: str, where: str) -> ConfigError:
        word = text.strip()
        texts = [token.strip() for token in self.texts]
        similar = dict.fromkeys(each for each in texts if each[:1].lower() == word[:1].lower())
        close = near_misses(word, similar) if word else ""
        hint = close or "Give a text that is one token, or id:NUMBER."
        return ConfigError(f"`{text}` is not a token of this model", where=where, hint=hint)


@dataclass(frozen=True)
class Concept:
    """For each word of a concept its forms, each a sequence of tokens."""

    forms: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def tokens(self) -> list[int]:
        """All tokens of all forms, sorted."""
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
    """Sort key of found vectors, best first."""
    return row["rank"], -row["score"], row["layer"], row["index"]


class Header(TypedDict):
    """Header of a map: the model, its fingerprint, and the texts of all tokens."""

    format_version: int
    model: str
    revision: NotRequired[str | None]
    fingerprint: Fingerprint
    tokenizer: NotRequired[dict[str, str | None] | None]
    side: str
    top_k: Count
    vocabulary: list[str]


_HEADER: Kind[Any] = Kind(Header, DataError, _HINT, "map of value vectors")


@dataclass(frozen=True)
class Map:
    """An open map."""

    path: Path
    header: dict[str, Any]

    def count(self) -> int:
        """Number of vectors in the map."""
        import pyarrow.parquet as pq

        return int(pq.read_metadata(self.path).num_rows)

    def rows(self, tokens: list[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows that list one of `tokens`, in file order.

        Raises:
            DataError: the file is damaged.
        """
        # Columns are read through their buffers: importing pyarrow.compute, pandas (for conversions) or numpy.ma (for
        # np.unique) would take longer than the whole search.
        import numpy as np
        import pyarrow.parquet as pq

        # The texts are in the header, so the column `token` is not read.
        columns = ["layer", "index", "tokens.list.element.id", "tokens.list.element.score"]
        texts = self.header["vocabulary"]
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                layers, indices, listed = batch.columns
                offsets = _numbers(listed.offsets, "int32")
                ids = _numbers(listed.values.field("id"), "int32")
                scores = _numbers(listed.values.field("score"), "float32")
                places = np.flatnonzero(np.logical_or.reduce([ids == token for token in tokens]))
                for row in dict.fromkeys((np.searchsorted(offsets, places, side="right") - 1).tolist()):
                    inside = slice(int(offsets[row]), int(offsets[row + 1]))
                    pairs = zip(ids[inside].tolist(), scores[inside].tolist(), strict=True)
                    yield {
                        "layer": layers[row].as_py(),
                        "index": indices[row].as_py(),
                        "tokens": [{"id": token, "token": texts[token], "score": score} for token, score in pairs],
                    }
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise _damaged(self.path, error) from error

    def search(self, concept: Concept, limit: int, layers: list[int] | None = None) -> list[dict[str, Any]]:
        """Rows `{layer, index, rank, score, tokens}` of the vectors that promote a concept most, best first.

        Only vectors that list one of its tokens among their k best are found. A token that is not listed counts with
        rank k + 1 and the last listed score, the best that it can have.
        """
        rows = []
        for row in self.rows(concept.tokens):
            if layers is None or row["layer"] in layers:
                listed = {t["id"]: (rank, t["score"]) for rank, t in enumerate(row["tokens"], 1)}
                missing = (len(row["tokens"]) + 1, row["tokens"][-1]["score"])
                rank, score = concept.measure({token: listed.get(token, missing) for token in concept.tokens})
                rows.append({"layer": row["layer"], "index": row["index"], "rank": rank, "score": score} | row)
        rows.sort(key=best_first)
        return rows[:limit]

    def split(self, word: str) -> list[int]:
        """Tokens of a word inside a sentence, by the tokenizer in the folder of the map's model.

        Raises:
            ConfigError: the tokenizer is not on this machine.
        """
        path = Path(self.header["model"]) / "tokenizer.json"
        if not path.is_file():
            hint = "Its tokenizer is not on this machine: give --model, or another word."
            raise ConfigError(f"`{word}` is not a single token of the map's model", where="TOKEN", hint=hint)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        found = tokenizer.encode(word, add_special_tokens=False)
        if not (found.tokens and found.tokens[0].startswith(("▁", "Ġ"))):
            found = tokenizer.encode(f" {word}", add_special_tokens=False)
        return list(found.ids) if tokenizer.decode(found.ids).strip() == word else []

    def check_model(self, fingerprint: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
        """Raise ModelError if the map was written for another model.

        Args:
            tokenizer: hashes, see `tokenizer_hashes`.
        """
        from braces_cli.core.models.identity import differences

        found = differences(self.header["fingerprint"], fingerprint, "map")
        vocabulary = (self.header.get("tokenizer") or {}).get("vocabulary")
        if not found and vocabulary and vocabulary != tokenizer["vocabulary"]:
            found = ["another vocabulary"]
        if found:
            what = f"this map was written for another model ({'; '.join(found)})"
            hint = f"Use it with {self.header['model']}, or write one: braces inspect values --output FILE."
            raise ModelError(what, where=str(self.path), hint=hint)


def _numbers(column: Any, dtype: str) -> Any:
    """A pyarrow column without nulls as a numpy view of its memory."""
    import numpy as np

    if column.null_count:
        raise ValueError("a number is missing")
    values = np.frombuffer(column.buffers()[1], dtype=dtype) if len(column) else np.empty(0, dtype)
    return values[column.offset : column.offset + len(column)]


def open_map(path: Path) -> Map:
    """Read the header of a map.

    Raises:
        ConfigError: the file does not exist.
        DataError: the file is not a map.
    """
    if not os.path.isfile(path):  # unlike pathlib's, it does not raise without permission to read the folder
        raise ConfigError("no such map", where=str(path), hint=_HINT)
    import pyarrow.parquet as pq

    try:
        # `read_schema` would also decode the copy of the header in Arrow's schema.
        text = pq.read_metadata(path).metadata[_KEY]
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise _damaged(path, error) from error
    return Map(path, parse(_HEADER, text, str(path)))


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return DataError(f"not a map of value vectors ({reason})", where=str(path), hint=_HINT)


def write_map(path: Path, header: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> int:
    """Write a map atomically and return its number of vectors. Memory: 8,192 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    token = pa.struct([("id", pa.int32()), ("token", pa.string()), ("score", pa.float32())])
    schema = pa.schema([("layer", pa.int32()), ("index", pa.int32()), ("tokens", pa.list_(token))])
    schema = schema.with_metadata({_KEY: json.dumps(header, ensure_ascii=False).encode()})
    remaining, count = iter(rows), 0

    def write(temporary: Path) -> None:
        nonlocal count
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while block := list(islice(remaining, _ROWS_AT_ONCE)):
                writer.write_table(pa.Table.from_pylist(block, schema=schema))
                count += len(block)

    write_atomic(path, write)
    return count
