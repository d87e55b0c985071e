"""The k best of scores that arrive in blocks, the same ones every time: of equal scores the lower token comes first.

torch's own topk leaves open which of equal elements it returns. Here score and token become one integer, the score's
bits in front, so that no two elements are equal and order is total.

The vectors of an FFN by side: what its neurons write (value) and what they read (gate and up).

From a vector in the residual stream to vocabulary scores: final norm, then LM head.

Which tokens each vector of the FFNs promotes: top-k of LM head(final norm(v_j)) (Geva et al., 2022).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braces_cli.core.adapter.model import Session
from braces_cli.core.errors import ConfigError, ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack
from braces_cli.core.models.load import tokenizer_hashes
from braces_cli.core.models.tokenize import token_text
from braces_cli.core.models.weights import at_hand, compute_device, dense, stored_values
from braces_cli.core.progress import Report, silent

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


SIDES = ("value", "gate", "up")


def plain_ffns(found: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """The feed-forward layers of a model, each of one network.

    Raises:
        ModelError: a layer mixes experts, whose value vectors have no single weight for a token.
    """
    ffns: list[FFN] = []
    for ffn in found:
        if not isinstance(ffn, FFN):
            hint = "The summary (braces inspect alone), values, and find with words work on mixtures of experts."
            raise ModelError(f"layer {ffn.layer} is a mixture of experts, which this cannot look into", hint=hint)
        ffns.append(ffn)
    return ffns


def check_side(side: str) -> None:
    """Raises:
    ConfigError: an unknown side.
    """
    if side not in SIDES:
        raise ConfigError(f"no side `{side}`", where="--side", hint=f"There is: {', '.join(SIDES)}.")


def side_vectors(ffn: FFN, side: str) -> Tensor:
    """(d_ff, d): row j belongs to neuron j; a view of the model's own weight.

    Raises:
        ConfigError: an unknown side, or `gate` where there is none.
    """
    check_side(side)
    if side == "value":
        return ffn.value_matrix().mT.detach()
    if not _gated(ffn):
        if side == "gate":
            hint = "It has the sides value and up."
            raise ConfigError("the FFN of this model has no gate", where="--side", hint=hint)
        return _rows(ffn.keys[0])
    first = (side == "gate") == _gate_comes_first(ffn)
    if len(ffn.keys) > 1:
        return _rows(ffn.keys[0 if first else 1])
    return _rows(ffn.keys[0]).chunk(2)[0 if first else 1]


def stacks(ffn: FFN | MixtureFFN, side: str) -> Iterator[tuple[int, Tensor]]:
    """Pairs (index of the first, vectors (n, d)) that together are the vectors of a layer.

    In a mixture of experts indices run on from expert to expert, as in `MixtureFFN.value_matrix`, and each stack is one
    expert's: a view, for all of them together would be a copy.

    Raises:
        ConfigError: an unknown side, `gate` where there is none, or another than `value` of a mixture.
    """
    if isinstance(ffn, FFN):
        yield 0, side_vectors(ffn, side)
        return
    check_side(side)
    if side != "value":
        hint = "Of experts only value vectors can be read: --side value."
        raise ConfigError(f"layer {ffn.layer} is a mixture of experts", where="--side", hint=hint)
    start = 0
    for part in ffn.parts:
        values = part.value_matrix().detach()
        for matrix in values if values.ndim == 3 else values[None]:
            yield start, matrix.mT
            start += matrix.shape[1]


def _rows(module: nn.Module) -> Tensor:
    """Weight as (outputs, inputs), unpacked where it is packed."""
    return dense(stored_values(module)).detach()


def _gated(ffn: FFN) -> bool:
    return len(ffn.keys) > 1 or len(_rows(ffn.keys[0])) == 2 * ffn.value_vectors


def _gate_comes_first(ffn: FFN) -> bool:
    """Which of the two is activated. Turning the sign of `up` turns the sign of act(gate) * up; that of `gate` does
    not, whatever the activation. Where the FFN cannot be called alone the field's usual order stands: gate first."""
    weight = _rows(ffn.keys[0])
    if weight.is_meta or not ffn.whole:
        return True
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight)
    seen: list[Tensor] = []

    def turn(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        half = output.shape[-1] // 2 if len(ffn.keys) == 1 else output.shape[-1]
        return torch.cat([-output[..., :half], output[..., half:]], dim=-1)

    def keep(module: nn.Module, args: tuple) -> None:
        seen.append(args[0].float())

    handles = [ffn.value.register_forward_pre_hook(keep)]
    try:
        with torch.no_grad():
            ffn.host(h)
            handles.append(ffn.keys[0].register_forward_hook(turn))
            ffn.host(h)
    finally:
        for handle in handles:
            handle.remove()
    return not torch.allclose(seen[0], -seen[1], rtol=1e-3, atol=1e-6)


# Scores that are held at a time: of so many vectors over so many tokens (64 MiB).
VECTORS_AT_ONCE = 2048
_TOKENS_AT_ONCE = 8192


def _parent(model: nn.Module) -> nn.Module:
    return model.get_submodule(layer_stack(model)[0].rpartition(".")[0])


def final_norm(model: nn.Module) -> nn.Module:
    """The norm behind the last layer: the last norm among the siblings of the stack of layers, identity if none."""
    norms = [child for child in _parent(model).children() if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()


class LogitLens:
    """Final norm and LM head of a model, applied to any vectors.

    Raises:
        ModelError: the model has no LM head.
    """

    def __init__(self, model: Any) -> None:
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ModelError(f"{type(model).__name__} has no LM head", hint="Give a causal language model.")
        self.norm = final_norm(model)
        # OPT-350m alone has embeddings narrower than its layers, and a projection down to them.
        self.narrow = getattr(_parent(model), "project_out", None)
        sizes = getattr(self.head, "out_features", None) or self.head.weight.shape[0]
        self.vocabulary = int(sizes)
        self.device = compute_device(self.head)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Scores (n, vocabulary) in float32 of vectors (n, d), as the model itself computes them."""
        with torch.no_grad():
            result: Tensor = self.head(self.hidden(vectors))
        return result.float()

    def hidden(self, vectors: Tensor) -> Tensor:
        """What enters the head, (n, d) -> (n, width of the head)."""
        with torch.no_grad():
            hidden: Tensor = self.norm(vectors)
            # Under a device map the head may run elsewhere.
            return (hidden if self.narrow is None else self.narrow(hidden)).to(self.device)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Weight (tokens, width) and bias (tokens,) of the head for the tokens `start` to `stop - 1`."""
        bias = getattr(self.head, "bias", None)
        return self.head.weight[start:stop].detach(), None if bias is None else bias[start:stop].detach()

    def row(self, token: int) -> tuple[Tensor, float]:
        """The head's weight for one token (width of the head,) and its bias, in float32."""
        with at_hand(self.head):
            if self._plain():
                weight, bias = self.rows(token, token + 1)
                return weight[0].float(), 0.0 if bias is None else float(bias)
        width = int(self.head.in_features)
        eye = torch.eye(width, device=self.device, dtype=_dtype(self.norm))
        with torch.no_grad():
            zero = self.head(torch.zeros_like(eye[:1]))[0, token].float()
            return self.head(eye)[:, token].float() - zero, float(zero)

    def _plain(self) -> bool:
        """The head is a product with a dense weight that is here, neither packed nor elsewhere."""
        weight = self.head.weight
        dense = isinstance(self.head, nn.Linear) and weight.ndim == 2 and weight.is_floating_point()
        return bool(dense and not weight.is_meta and weight.shape[0] == self.vocabulary)

    def blocks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first token, scores (n, tokens)) that together cover the vocabulary; never all of it at a time.

        Scores are overwritten by those of the next block.
        """
        if not self._plain():
            with torch.no_grad():
                yield 0, self.head(hidden)
            return
        wide = _compute_dtype(self.head.weight)
        hidden = hidden.detach().to(wide)
        # One buffer for all blocks: fresh memory for each costs a share of the product in page faults.
        buffer = hidden.new_empty(len(hidden), min(_TOKENS_AT_ONCE, self.vocabulary))
        for start in range(0, self.vocabulary, _TOKENS_AT_ONCE):
            weight, bias = self.rows(start, start + _TOKENS_AT_ONCE)
            scores = buffer if len(weight) == buffer.shape[1] else hidden.new_empty(len(hidden), len(weight))
            torch.mm(hidden, weight.to(wide).mT, out=scores)
            yield start, scores if bias is None else scores.add_(bias.to(wide))

    def best(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores (n, k) and tokens (n, k), best first, of equal scores the lower token first.

        Memory: the scores of 2,048 vectors over 8,192 tokens, whatever n and the vocabulary are.
        """
        k = min(k, self.vocabulary)
        # A head that cannot be cut gives its whole vocabulary: as many scores, of fewer vectors.
        whole = max(1, VECTORS_AT_ONCE * _TOKENS_AT_ONCE // self.vocabulary)
        parts = []
        for block in vectors.split(VECTORS_AT_ONCE if self._plain() else whole):
            top = TopK(len(block), k, self.device)
            for start, scores in self.blocks(self.hidden(block)):
                top.add(scores, start)
            parts.append(top.result())
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])

    def scores_of(self, vectors: Tensor, tokens: Sequence[int]) -> Tensor:
        """Scores of a few tokens alone, (n, tokens), in float32."""
        if not self._plain():
            whole = max(1, VECTORS_AT_ONCE * _TOKENS_AT_ONCE // self.vocabulary)
            return torch.cat([self(block)[:, list(tokens)] for block in vectors.split(whole)])
        wide = _compute_dtype(self.head.weight)
        ids = torch.tensor(list(tokens), device=self.device)
        weight, bias = self.head.weight[ids].detach().to(wide), self.rows(0, self.vocabulary)[1]
        parts = [self.hidden(block).to(wide) @ weight.mT for block in vectors.split(VECTORS_AT_ONCE)]
        scores = torch.cat(parts).float()
        return scores if bias is None else scores + bias[ids].float()

    def ranks(self, vectors: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Place of each token among all tokens, the best at 1, and its score, both (n, tokens).

        Ties and memory as in `best`.
        """
        ids = torch.tensor(list(tokens), device=self.device)
        whole = VECTORS_AT_ONCE if self._plain() else max(1, VECTORS_AT_ONCE * _TOKENS_AT_ONCE // self.vocabulary)
        places, owns = [], []
        for block in vectors.split(whole):
            own = self.scores_of(block, tokens)
            place = torch.ones(own.shape, dtype=torch.int64, device=own.device)
            for start, scores in self.blocks(self.hidden(block)):
                numbers = torch.arange(start, start + scores.shape[1], device=self.device)
                for column, token in enumerate(ids):
                    mine, other = own[:, column, None], scores.float()
                    ahead = (other > mine) | ((other == mine) & (numbers < token))
                    # The same product in another shape rounds differently: a token is not to be compared with itself.
                    place[:, column] += (ahead & (numbers != token)).sum(dim=1)
            places.append(place)
            owns.append(own)
        return torch.cat(places), torch.cat(owns)


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """float32 for half-precision weights on a CPU without instructions for them, where it is several times faster."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.dtype
    # Older releases of torch do not say what a CPU can do.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(capabilities.get(name, False) for name in ("amx_tile", "avx512_bf16"))
    return weight.dtype if fast and weight.dtype == torch.bfloat16 else torch.float32


class TokenTexts:
    """Texts of tokens, each decoded once: a map names few tokens many times."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = token_text(self._tokenizer, token)
        return self._known[token]


def best_tokens(lens: LogitLens, texts: TokenTexts, vectors: Tensor, k: int) -> list[list[dict[str, Any]]]:
    """The k best tokens of each vector (n, d) as `{id, token, score}`, best first."""
    scores, ids = lens.best(vectors, k)
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return [[{"id": t, "token": texts[t], "score": s} for t, s in zip(*row, strict=True)] for row in pairs]


def value_tokens(
    session: Session,
    layers: Collection[int] | None = None,
    indices: Collection[int] | None = None,
    top_k: int = 10,
    report: Report = silent,
    side: str = "value",
) -> Iterator[dict[str, Any]]:
    """Rows `{layer, index, tokens: [{id, token, score}]}`, tokens best first, of equal scores the lower id first.

    In a mixture of experts indices run on from expert to expert. Memory: the scores of 2,048 vectors over 8,192 tokens
    at a time.

    Args:
        layers: decoder layers; None is all.
        indices: vectors within each layer; None is all.
        top_k: tokens for each vector.
        side: `value`, or `gate` or `up`, whose rows read the residual stream instead of writing it.

    Raises:
        ConfigError: an index that a chosen layer does not have, or a side that the model (or `stacks`) does not have.
    """
    chosen = [ffn for ffn in session.ffns if layers is None or ffn.layer in layers]
    for ffn in chosen:
        check_indices(ffn, indices or ())
    lens = LogitLens(session.base.model)
    texts = TokenTexts(session.base.tokenizer)
    total = sum(len(indices) if indices is not None else ffn.value_vectors for ffn in chosen)
    done = 0
    for ffn in chosen:
        requested = torch.tensor(sorted(indices) if indices is not None else range(ffn.value_vectors))
        for start, matrix in stacks(ffn, side):
            inside = requested[(requested >= start) & (requested < start + len(matrix))]
            for block in inside.split(VECTORS_AT_ONCE) if len(inside) else ():
                listed = best_tokens(lens, texts, matrix[(block - start).to(matrix.device)], top_k)
                done += len(block)
                report(f"reading {side} vectors", done, total)
                for index, tokens in zip(block.tolist(), listed, strict=True):
                    yield {"layer": ffn.layer, "index": index, "tokens": tokens}


def check_indices(ffn: FFN | MixtureFFN, indices: Collection[int], where: str = "--index") -> None:
    """Raises:
    ConfigError: an index that the layer does not have.
    """
    wrong = [index for index in indices if not 0 <= index < ffn.value_vectors]
    if wrong:
        hint = f"Layer {ffn.layer} has value vectors 0 to {ffn.value_vectors - 1}."
        raise ConfigError(f"no value vector {wrong[0]}", where=where, hint=hint)


def map_header(session: Session, side: str, top_k: int) -> dict[str, Any]:
    """What a map file says about itself: `{model, fingerprint, tokenizer, side, top_k, vocabulary}`, the last of
    these the texts of all tokens, so that a reader needs no tokenizer."""
    base = session.base
    size = LogitLens(base.model).vocabulary
    texts = TokenTexts(base.tokenizer)
    return {
        "format_version": 1,
        "model": base.name,
        "revision": base.revision,
        "fingerprint": base.fingerprint(session.ffns),
        "tokenizer": tokenizer_hashes(base.tokenizer),
        "side": side,
        "top_k": min(top_k, size),
        "vocabulary": [texts[token] for token in range(size)],
    }
