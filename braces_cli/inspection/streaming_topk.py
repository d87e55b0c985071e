"""The k best of scores that arrive in blocks, the same ones every time: of equal scores the lower token comes first.

torch's own topk leaves open which of equal elements it returns. Here score and token become one integer, the score's
bits in front, so that no two elements are equal and order is total.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements whose maximum stands for them in the first sieve.
_GROUP = 32
# Rows that are sieved at a time on a CPU: their scores stay in its cache.
_ROWS = 256
_LOW = (1 << 31) - 1


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 that order as (score, -id) do; `scores` float32, `ids` below 2^31, shapes that broadcast."""
    bits = (scores + 0.0).view(torch.int32)  # adding 0 makes -0 a 0, which it equals
    ordered = torch.where(bits < 0, bits ^ _LOW, bits)
    return (ordered.long() << 32) | (_LOW - ids)


def _scores(keys: Tensor) -> Tensor:
    """The scores inside keys, float32."""
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ _LOW, ordered).view(torch.float32)


def _above(scores: Tensor, cutoff: Tensor) -> Tensor:
    return scores > cutoff


def _not_below(scores: Tensor, cutoff: Tensor) -> Tensor:
    return ~(scores < cutoff)  # NaN is let in, so that k are found in any case


def _table(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (n,) of ascending `rows` (n,) as one line for each row that has any: those rows, and (rows, most keys of
    one), filled up with what is below any key."""
    live, line, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[line]
    table = keys.new_full((len(live), int(counts.max()) if len(live) else 0), torch.iinfo(torch.int64).min)
    table[line, column] = keys
    return live, table


class TopK:
    """Running k best of each row.

    Args:
        rows: number of rows.
        k: how many to keep.
        device: of the scores.
    """

    def __init__(self, rows: int, k: int, device: torch.device | str = "cpu") -> None:
        self._k = k
        self._best = torch.empty(rows, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, start: int) -> None:
        """Take in `scores` (rows, n) of the ids `start` to `start + n - 1`, which lie above all ids seen before.

        Only groups whose maximum can get in are looked at one by one, which after the first blocks are few. Memory: a
        fraction of the scores' own, and at most that of all scores of 256 rows as integers (of all rows on a GPU).
        """
        rows, count = scores.shape
        if count <= 2 * self._k * _GROUP:
            ids = torch.arange(start, start + count, device=scores.device)
            self._best = self._merge(self._best, _keys(scores.float(), ids))
            return
        if count % _GROUP:
            scores = F.pad(scores, (0, -count % _GROUP), value=-torch.inf)
        # Group g holds the ids g, g + groups, ...: maxima over neighbours are several times slower to find.
        groups = scores.view(rows, _GROUP, -1)
        step = _ROWS if scores.device.type == "cpu" else rows
        pairs = zip(self._best.split(step), groups.split(step), strict=True)
        self._best = torch.cat([self._improve(best, part, start) for best, part in pairs])

    def _improve(self, best: Tensor, groups: Tensor, start: int) -> Tensor:
        """`best` (rows, up to k) and the scores `groups` (rows, members, groups) in one: (rows, k)."""
        maxima = groups.amax(dim=1)
        if best.shape[1] == self._k:
            # Of equal scores the lower id stays, so a later one must be larger to get in.
            cutoff, passes = _scores(best[:, -1:]), _above
        else:
            # So many groups reach this score that no lower one is among the k best; of equal ones any may be.
            cutoff, passes = maxima.float().topk(self._k, dim=1).values[:, -1:], _not_below
        row, group = passes(maxima, cutoff).nonzero(as_tuple=True)
        members = groups[row, :, group]
        place, member = passes(members, cutoff[row]).nonzero(as_tuple=True)
        ids = start + member * groups.shape[2] + group[place]
        live, keys = _table(row[place], _keys(members[place, member].float(), ids))
        if best.shape[1] < self._k:  # then every row is live
            return self._merge(best, keys)
        return best.index_copy(0, live, self._merge(best[live], keys))

    def _merge(self, best: Tensor, keys: Tensor) -> Tensor:
        keys = torch.cat([best, keys], dim=1)
        return keys.topk(min(self._k, keys.shape[1]), dim=1).values

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (rows, k) in float32 and ids (rows, k), best first."""
        return _scores(self._best), _LOW - (self._best & _LOW)
