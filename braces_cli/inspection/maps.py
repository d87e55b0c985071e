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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from braces_cli.core.errors import ConfigError, DataError, ModelError
from braces_cli.core.files import write_atomic
from braces_cli.core.models.identity import Sizes, check_same_base
from braces_cli.core.schema import Count, Kind, parse

if TYPE_CHECKING:
    from braces_cli.core.models.load import Base

_KEY = b"braces"
_ROWS_AT_ONCE = 8192
_HINT = "`braces inspect values --output FILE` writes maps."


@dataclass(frozen=True)
class Vocabulary:
    """Texts of all tokens.

    A word has these forms: the single tokens that spell it, with and without a leading space, as written and, if it is
    in lower case, capitalised. A word without such a token has one form, the tokens that the tokenizer splits it into.
    A word with a leading space is that token alone, `id:123` the token with that number.
    """

    texts: Sequence[str]

    def forms(self, word: str, where: str, tokenizer: Any = None) -> list[tuple[int, ...]]:
        """Return the forms of a word.

        Args:
            tokenizer: splits words that are not single tokens, if there is one.

        Raises:
            ConfigError: this vocabulary cannot express the word.
        """
        last = len(self.texts) - 1
        if word.startswith("id:"):
            number = word.removeprefix("id:")
            if not re.fullmatch("[0-9]{1,9}", number) or int(number) > last:
                raise ConfigError(f"no token {number}", where=where, hint=f"The tokens are id:0 to id:{last}.")
            return [(int(number),)]
        spellings = [word] if word.startswith(" ") else [f" {word}", word]
        if word == word.lower() and not word.startswith(" "):
            spellings += [f" {word.capitalize()}", word.capitalize()]
        singles: list[tuple[int, ...]] = []
        for spelling in dict.fromkeys(spellings):
            singles += [(token,) for token, text in enumerate(self.texts) if text == spelling]
        if singles:
            return singles
        if tokenizer is not None and word.strip():
            from braces_cli.core.models.tokenize import encode_word

            pieces = tuple(encode_word(tokenizer, word.strip()))
            # Tokenizers replace or drop characters that they cannot express.
            if pieces and tokenizer.decode(pieces).strip() == word.strip():
                return [pieces]
        hint = "Give a text that is one token, or id:NUMBER. A map needs --model for words of several tokens."
        raise ConfigError(f"`{word}` is not a token of this model", where=where, hint=hint)

    def single(self, text: str, where: str) -> int:
        """Return one token for `text`: with a leading space, as inside a sentence, if there is such a token."""
        return self.forms(text, where)[0][0]

    def concept(self, words: Sequence[str], tokenizer: Any = None) -> Concept:
        """Return the forms of several words; see `forms`."""
        return Concept([self.forms(word, "TOKEN", tokenizer) for word in words])


@dataclass(frozen=True)
class Concept:
    """For each word of a concept its forms, each a sequence of tokens."""

    forms: list[list[tuple[int, ...]]]

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
    """Header of a map: the model, its sizes, and the texts of all tokens."""

    format_version: int
    model: str
    revision: NotRequired[str | None]
    base: Sizes
    tokenizer: NotRequired[dict[str, str | None] | None]
    top_k: Count
    vocabulary: list[str]


_HEADER: Kind[Any] = Kind(Header, DataError, _HINT, "map of value vectors")


@dataclass(frozen=True)
class Map:
    """An open map."""

    path: Path
    header: dict[str, Any]

    def search(self, concept: Concept, limit: int, layers: list[int] | None = None) -> list[dict[str, Any]]:
        """Rows `{layer, index, rank, score, tokens}` of the vectors that promote a concept most, best first.

        Only vectors that list one of its tokens among their k best are found. A token that is not listed counts with
        rank k + 1 and the last listed score, the best that it can have.

        Raises:
            DataError: the file is damaged.
        """
        # Importing pyarrow.compute, pandas (for conversions) or numpy.ma (for np.unique) would take longer than the
        # whole search.
        import numpy as np
        import pyarrow.parquet as pq

        # The texts are in the header, so the column `token` is not read.
        columns = ["layer", "index", "tokens.list.element.id", "tokens.list.element.score"]
        tokens, texts, rows = concept.tokens, self.header["vocabulary"], []
        with _damage_reported(self.path):
            for batch in pq.ParquetFile(self.path).iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                layer_column, indices, listed = batch.columns
                offsets = np.from_dlpack(listed.offsets)
                ids = np.from_dlpack(listed.values.field("id"))
                scores = np.from_dlpack(listed.values.field("score"))
                places = np.flatnonzero(np.logical_or.reduce([ids == token for token in tokens]))
                for row in dict.fromkeys((np.searchsorted(offsets, places, side="right") - 1).tolist()):
                    layer = layer_column[row].as_py()
                    if layers is not None and layer not in layers:
                        continue
                    inside = slice(int(offsets[row]), int(offsets[row + 1]))
                    best = list(zip(ids[inside].tolist(), scores[inside].tolist(), strict=True))
                    found = {token: (rank, score) for rank, (token, score) in enumerate(best, 1)}
                    rank, score = concept.measure({t: found.get(t, (len(best) + 1, best[-1][1])) for t in tokens})
                    place = {"layer": layer, "index": indices[row].as_py(), "rank": rank, "score": score}
                    rows.append(place | {"tokens": [{"id": t, "token": texts[t], "score": s} for t, s in best]})
        return sorted(rows, key=best_first)[:limit]

    def check_base(self, base: Base) -> None:
        """Raise ModelError if the map was written for a model with other sizes or another vocabulary."""
        hint = f"Use it with {self.header['model']}, or write one: braces inspect values --output FILE."
        check_same_base("this map was written for", self.header["base"], {}, base, str(self.path), hint)
        vocabulary = (self.header.get("tokenizer") or {}).get("vocabulary")
        if vocabulary and vocabulary != base.tokenizer_hashes["vocabulary"]:
            raise ModelError("this map was written for another vocabulary", where=str(self.path), hint=hint)


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Raise DataError for an error of pyarrow about the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise DataError(f"not a map of value vectors ({reason})", where=str(path), hint=_HINT) from error


def open_map(path: Path) -> Map:
    """Read the header of a map.

    Raises:
        ConfigError: the file does not exist.
        DataError: the file is not a map.
    """
    if not os.path.isfile(path):  # unlike pathlib's, it does not raise without permission to read the folder
        raise ConfigError("no such map", where=str(path), hint=_HINT)
    import pyarrow.parquet as pq

    with _damage_reported(path):
        # `read_schema` would also decode the copy of the header in Arrow's schema.
        text = pq.read_metadata(path).metadata[_KEY]
    return Map(path, parse(_HEADER, text, str(path)))


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
