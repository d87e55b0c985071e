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

        The k best of a block lie in the k groups of the largest maxima, so only those are looked at one by one, and
        only in rows where one of them beats the worst that is kept. Memory: the scores' own again at most.
        """
        rows, count = scores.shape
        if count <= 2 * self._k * _GROUP:
            ids = torch.arange(start, start + count, device=scores.device)
            self._best = self._merge(self._best, _keys(scores.float(), ids))
            return
        if count % _GROUP:
            scores = F.pad(scores, (0, -count % _GROUP), value=-torch.inf)
        groups = scores.view(rows, -1, _GROUP)
        maxima = groups.amax(dim=-1).float()
        if self._best.shape[1] == self._k:
            # Of equal scores the lower id stays, so a later one must be larger to get in.
            live = (maxima.amax(dim=1) > _scores(self._best[:, -1])).nonzero().squeeze(1)
            self._best[live] = self._merge(self._best[live], self._sift(groups, maxima, live, start))
        else:
            every = torch.arange(rows, device=scores.device)
            self._best = self._merge(self._best, self._sift(groups, maxima, every, start))

    def _sift(self, groups: Tensor, maxima: Tensor, live: Tensor, start: int) -> Tensor:
        """Keys of the elements of the k best groups of the rows `live`."""
        numbers = torch.arange(groups.shape[1], device=groups.device)
        chosen = _LOW - (_keys(maxima[live], numbers).topk(self._k, dim=1, sorted=False).values & _LOW)
        ids = start + chosen[..., None] * _GROUP + torch.arange(_GROUP, device=groups.device)
        return _keys(groups[live[:, None], chosen].float(), ids).flatten(1)

    def _merge(self, best: Tensor, keys: Tensor) -> Tensor:
        keys = torch.cat([best, keys], dim=1)
        return keys.topk(min(self._k, keys.shape[1]), dim=1).values

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (rows, k) in float32 and ids (rows, k), best first."""
        return _scores(self._best), _LOW - (self._best & _LOW)
