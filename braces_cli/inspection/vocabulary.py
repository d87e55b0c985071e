"""Vocabulary tokens that the vectors of the FFNs promote (Geva et al., 2022).

The score of token t for a vector v is (W_head norm(v))_t, with the final norm and the LM head of the model. For each
vector the k best tokens are listed; of equal scores the lower token id comes first. The vectors of an FFN are its value
vectors (side `value`) or the rows of its input projections (`gate`, `up`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack
from braces_cli.core.models.load import Base
from braces_cli.core.models.tokenize import token_text
from braces_cli.core.models.weights import dense, stored_bias, stored_values
from braces_cli.core.progress import Report, silent
from braces_cli.inspection.maps import Vocabulary

# Size of the score blocks: 2,048 vectors over 8,192 tokens take 64 MiB in float32.
VECTORS_AT_ONCE = 2048
_TOKENS_AT_ONCE = 8192
# Scores per group in `TopK.add`; only groups whose maximum is large enough are examined.
_GROUP = 32
# Rows per step in `TopK.add` on a CPU, so that their scores stay in its cache.
_ROWS = 256
_LOW = (1 << 31) - 1


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 keys in the order of (score, -id); `scores` float32, `ids` below 2^31, broadcastable shapes."""
    bits = (scores + 0.0).view(torch.int32)  # adding 0 turns -0 into 0
    ordered = torch.where(bits < 0, bits ^ _LOW, bits)
    return (ordered.long() << 32) | (_LOW - ids)


def _scores(keys: Tensor) -> Tensor:
    """Scores in `keys`, float32."""
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ _LOW, ordered).view(torch.float32)


class TopK:
    """Running k best scores of each row, in an order without ties.

    torch.topk returns any of several equal elements. Here a score and its id form one integer key, so that no two
    elements are equal.
    """

    def __init__(self, rows: int, k: int, device: torch.device | str = "cpu") -> None:
        self._k = k
        self._best = torch.empty(rows, 0, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, start: int) -> None:
        """Add `scores` (rows, n) of the ids `start` to `start + n - 1`, which are larger than all ids before.

        Memory: at most that of 256 rows of scores as int64 (of all rows on a GPU).
        """
        rows, count = scores.shape
        if count <= 2 * self._k * _GROUP:
            ids = torch.arange(start, start + count, device=scores.device)
            self._best = self._merge(self._best, _keys(scores.float(), ids))
            return
        if count % _GROUP:
            scores = F.pad(scores, (0, -count % _GROUP), value=-torch.inf)
        # Group g has the ids g, g + groups, ...: maxima over adjacent scores take several times longer.
        groups = scores.view(rows, _GROUP, -1)
        step = _ROWS if scores.device.type == "cpu" else rows
        pairs = zip(self._best.split(step), groups.split(step), strict=True)
        self._best = torch.cat([self._improve(best, part, start) for best, part in pairs])

    def _improve(self, best: Tensor, groups: Tensor, start: int) -> Tensor:
        """Merge the scores `groups` (rows, members, groups) into `best` (rows, up to k): (rows, k)."""
        maxima = groups.amax(dim=1)
        full = best.shape[1] == self._k
        # With k entries, a score must exceed the lowest one: of equal scores the lower id stays. Otherwise k groups
        # have a maximum of at least this cutoff; NaN passes, so that k scores are found in any case.
        cutoff = _scores(best[:, -1:]) if full else maxima.float().topk(self._k, dim=1).values[:, -1:]
        row, group = (maxima > cutoff if full else ~(maxima < cutoff)).nonzero(as_tuple=True)
        members, limit = groups[row, :, group], cutoff[row]
        place, member = (members > limit if full else ~(members < limit)).nonzero(as_tuple=True)
        ids = start + member * groups.shape[2] + group[place]
        keys = _keys(members[place, member].float(), ids)
        # One line of keys for each row that has any, padded with the smallest integer.
        live, line, counts = row[place].unique_consecutive(return_inverse=True, return_counts=True)
        column = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[line]
        table = keys.new_full((len(live), int(counts.max()) if len(live) else 0), torch.iinfo(torch.int64).min)
        table[line, column] = keys
        if not full:  # every row has keys
            return self._merge(best, table)
        return best.index_copy(0, live, self._merge(best[live], table))

    def _merge(self, best: Tensor, keys: Tensor) -> Tensor:
        keys = torch.cat([best, keys], dim=1)
        return keys.topk(min(self._k, keys.shape[1]), dim=1).values

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores (rows, k) in float32 and ids (rows, k), best first."""
        return _scores(self._best), _LOW - (self._best & _LOW)


def plain_ffns(found: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """Return the feed-forward layers of a model without experts.

    Raises:
        ModelError: a layer is a mixture of experts, where a value vector has several weights for one token.
    """
    ffns: list[FFN] = []
    for ffn in found:
        if not isinstance(ffn, FFN):
            hint = "The summary (braces inspect alone), values, and find with words work on mixtures of experts."
            raise ModelError(
                f"layer {ffn.layer} is a mixture of experts, which this command does not support", hint=hint
            )
        ffns.append(ffn)
    return ffns


def side_vectors(ffn: FFN, side: str) -> Tensor:
    """Vectors (d_ff, d) of one side; row j belongs to neuron j. A view of the weight where it is a plain tensor.

    Raises:
        ConfigError: the side is `gate` and the FFN has no gate.
    """
    if side == "value":
        return ffn.value_matrix().mT.detach()
    weights = [dense(stored_values(key)).detach() for key in ffn.keys]
    if len(weights) == 1 and len(weights[0]) == 2 * ffn.value_vectors:
        weights = list(weights[0].chunk(2))
    if len(weights) == 1:
        if side == "gate":
            hint = "It has the sides value and up."
            raise ConfigError("the FFN of this model does not have a gate", where="--side", hint=hint)
        return weights[0]
    first = (side == "gate") == _gate_comes_first(ffn, weights[0])
    return weights[0 if first else 1]


def _gate_comes_first(ffn: FFN, weight: Tensor) -> bool:
    """Return whether the first of two input projections is the gate.

    Changing the sign of `up` changes the sign of act(gate) * up, for every activation; changing that of `gate` does
    not. If the FFN cannot be called on its own, the usual order is assumed: gate first.
    """
    if weight.is_meta or not ffn.is_host_output:
        return True
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight)
    seen: list[Tensor] = []

    def negate(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        half = output.shape[-1] // 2 if len(ffn.keys) == 1 else output.shape[-1]
        return torch.cat([-output[..., :half], output[..., half:]], dim=-1)

    handles = [ffn.value.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))]
    try:
        with torch.no_grad():
            ffn.host(h)
            handles.append(ffn.keys[0].register_forward_hook(negate))
            ffn.host(h)
    finally:
        for handle in handles:
            handle.remove()
    return not torch.allclose(seen[0], -seen[1], rtol=1e-3, atol=1e-6)


def vector_blocks(ffn: FFN | MixtureFFN, side: str) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first vector, vectors (n, d)) that together cover one side of a layer.

    In a mixture of experts the index continues from expert to expert, as in `MixtureFFN.value_matrix`.

    Raises:
        ConfigError: the layer does not have this side.
    """
    matrices: Iterable[Tensor]
    if isinstance(ffn, FFN):
        matrices = [side_vectors(ffn, side)]
    elif side == "value":
        # One expert at a time: a packed weight is copied.
        values = (part.value_matrix().detach() for part in ffn.parts)
        matrices = (matrix.mT for value in values for matrix in (value if value.ndim == 3 else value[None]))
    else:
        hint = "Use --side value for mixtures of experts."
        raise ConfigError(f"layer {ffn.layer} is a mixture of experts", where="--side", hint=hint)
    start = 0
    for matrix in matrices:
        for block in matrix.split(VECTORS_AT_ONCE):
            yield start, block
            start += len(block)


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm after the last layer: the last norm among the siblings of the layers, identity if none."""
    norms = [child for child in _parent(model).children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()


def _parent(model: nn.Module) -> nn.Module:
    return model.get_submodule(layer_stack(model)[0].rpartition(".")[0])


class LogitLens:
    """Final norm and LM head of a model, applied to any vectors.

    Attributes:
        norm: the final norm.
        narrow: projection between norm and head; only OPT-350m has one.
        weight: of the head, (vocabulary, width); a dense copy if the weight is packed or offloaded.
        bias: of the head, (vocabulary,) or None.
        size: number of tokens in the vocabulary.

    Raises:
        ModelError: the model has no LM head.
    """

    def __init__(self, base: Base) -> None:
        head = base.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(base.model).__name__} has no LM head", hint="Give a causal language model.")
        self.norm = final_norm(base.model)
        self.narrow = getattr(_parent(base.model), "project_out", None)
        self.weight = dense(stored_values(head)).detach()
        self.bias = stored_bias(head)
        self.size = len(self.weight)
        self.device = self.weight.device
        self._compute_dtype = _compute_dtype(self.weight)
        self._tokenizer = base.tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """Text of one token; each token is decoded once."""
        if token not in self._texts:
            self._texts[token] = token_text(self._tokenizer, token)
        return self._texts[token]

    def vocabulary(self) -> Vocabulary:
        """Texts of all tokens."""
        return Vocabulary([self.text(token) for token in range(self.size)])

    def hidden(self, vectors: Tensor) -> Tensor:
        """Input of the head for vectors (n, d): (n, width of the head), in the dtype of the products."""
        with torch.no_grad():
            hidden: Tensor = self.norm(vectors)
            hidden = hidden if self.narrow is None else self.narrow(hidden)
        # With a device map the head may run on another device than the norm.
        return hidden.detach().to(self.device, self._compute_dtype)

    def blocks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first token, scores (n, tokens)) that together cover the vocabulary.

        The scores are overwritten by those of the next block.
        """
        # One buffer for all blocks: page faults of fresh memory would take a share of the product's time.
        buffer = hidden.new_empty(len(hidden), min(_TOKENS_AT_ONCE, self.size))
        for start in range(0, self.size, _TOKENS_AT_ONCE):
            weight = self.weight[start : start + _TOKENS_AT_ONCE].to(hidden.dtype)
            scores = buffer if len(weight) == buffer.shape[1] else hidden.new_empty(len(hidden), len(weight))
            torch.mm(hidden, weight.mT, out=scores)
            if self.bias is not None:
                scores.add_(self.bias[start : start + _TOKENS_AT_ONCE].to(scores))
            yield start, scores

    def best(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores (n, k) and tokens (n, k), best first, of equal scores the lower token first."""
        parts = []
        for block in vectors.split(VECTORS_AT_ONCE):
            top = TopK(len(block), min(k, self.size), self.device)
            for start, scores in self.blocks(self.hidden(block)):
                top.add(scores, start)
            parts.append(top.result())
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])

    def best_tokens(self, vectors: Tensor, k: int) -> list[list[dict[str, Any]]]:
        """The k best tokens of each vector (n, d) as `{id, token, score}`, best first."""
        scores, ids = self.best(vectors, k)
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        return [[{"id": t, "token": self.text(t), "score": s} for t, s in zip(*row, strict=True)] for row in pairs]

    def ranks(self, vectors: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rank of each token among all tokens, from 1, and its score, both (n, tokens); ties as in `best`."""
        chosen = torch.tensor(tokens, device=self.device)
        ranks, own_scores = [], []
        for block in vectors.split(VECTORS_AT_ONCE):
            hidden = self.hidden(block)
            own = (hidden @ self.weight[chosen].to(hidden.dtype).mT).float()
            if self.bias is not None:
                own = own + self.bias[chosen].float()
            rank = torch.ones(own.shape, dtype=torch.int64, device=own.device)
            for start, scores in self.blocks(hidden):
                scores = scores.float()
                ids = torch.arange(start, start + scores.shape[1], device=self.device)
                for column, token in enumerate(tokens):
                    score = own[:, column, None]
                    ahead = (scores > score) | ((scores == score) & (ids < token))
                    # A token is not compared with itself: a product of another shape is rounded differently.
                    rank[:, column] += (ahead & (ids != token)).sum(dim=1)
            ranks.append(rank)
            own_scores.append(own)
        return torch.cat(ranks), torch.cat(own_scores)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """float32 for half-precision weights on a CPU without instructions for them, where it is several times faster."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.dtype
    # Older releases of torch have no `get_capabilities`.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(capabilities.get(name, False) for name in ("amx_tile", "avx512_bf16"))
    return weight.dtype if fast and weight.dtype == torch.bfloat16 else torch.float32


def value_tokens(
    session: Session,
    layers: Collection[int] | None = None,
    indices: Collection[int] | None = None,
    top_k: int = 10,
    report: Report = silent,
    side: str = "value",
) -> Iterator[dict[str, Any]]:
    """Yield `{layer, index, tokens: [{id, token, score}]}` for each vector, tokens best first.

    Args:
        layers: decoder layers; None is all.
        indices: vectors in each layer; None is all.
        top_k: tokens per vector.
        side: `value`, `gate` or `up`.

    Raises:
        ConfigError: a chosen layer does not have an index or the side.
    """
    ffns = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    for ffn in ffns:
        check_indices(ffn, indices or (), "--index")
    lens = LogitLens(session.base)
    chosen = None if indices is None else set(indices)
    total = sum(ffn.value_vectors if chosen is None else len(chosen) for ffn in ffns)
    done = 0
    for ffn in ffns:
        for start, block in vector_blocks(ffn, side):
            numbers = [i for i in range(start, start + len(block)) if chosen is None or i in chosen]
            if not numbers:
                continue
            vectors = block if len(numbers) == len(block) else block[[i - start for i in numbers]]
            done += len(numbers)
            report(f"reading {side} vectors", done, total)
            for index, tokens in zip(numbers, lens.best_tokens(vectors, top_k), strict=True):
                yield {"layer": ffn.layer, "index": index, "tokens": tokens}


def check_indices(ffn: FFN | MixtureFFN, indices: Collection[int], where: str) -> None:
    """Raise ConfigError if the layer does not have one of the vectors."""
    wrong = [index for index in indices if not 0 <= index < ffn.value_vectors]
    if wrong:
        hint = f"Layer {ffn.layer} has value vectors 0 to {ffn.value_vectors - 1}."
        raise ConfigError(f"no value vector {wrong[0]}", where=where, hint=hint)


def map_header(session: Session, side: str, top_k: int) -> dict[str, Any]:
    """Header of a map file; see `maps.Header`. It has the texts of all tokens, so that readers need no tokenizer."""
    base, lens = session.base, LogitLens(session.base)
    return {
        "format_version": 1,
        "model": base.name,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "tokenizer": base.tokenizer_hashes,
        "side": side,
        "top_k": min(top_k, lens.size),
        "vocabulary": list(lens.vocabulary().texts),
    }
