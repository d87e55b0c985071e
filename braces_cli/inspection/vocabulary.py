"""Vocabulary tokens that the vectors of the FFNs promote (Geva et al., 2022).

The score of token t for a vector v is (W_head norm(v))_t, with the final norm and the LM head of the model. For each
value vector the k best tokens are listed.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from braces_cli.core.errors import ModelError
from braces_cli.core.models.ffn import FFN, MixtureFFN, layer_stack
from braces_cli.core.models.load import Base
from braces_cli.core.models.tokenize import token_text
from braces_cli.core.models.weights import dense, stored_bias, stored_values
from braces_cli.core.progress import Report, silent
from braces_cli.inspection.maps import Vocabulary

# Size of the score blocks: 2,048 vectors over 8,192 tokens take 64 MiB in float32.
VECTORS_AT_ONCE = 2048
_TOKENS_AT_ONCE = 8192


def plain_ffns(found: Sequence[FFN | MixtureFFN]) -> list[FFN]:
    """Return the feed-forward layers of a model without experts.

    Raises:
        ModelError: a layer is a mixture of experts, where a value vector has several weights for one token.
    """
    ffns = [ffn for ffn in found if isinstance(ffn, FFN)]
    if len(ffns) < len(found):
        layer = next(ffn.layer for ffn in found if not isinstance(ffn, FFN))
        hint = "The summary (braces inspect alone), values, and find with words work on mixtures of experts."
        raise ModelError(f"layer {layer} is a mixture of experts, which this command does not support", hint=hint)
    return ffns


def vector_blocks(ffn: FFN | MixtureFFN) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first vector, vectors (n, d)) that together cover the value vectors of a layer.

    In a mixture of experts the index continues from expert to expert, as in `MixtureFFN.value_matrix`.
    """
    start = 0
    # One expert at a time: a packed weight is copied.
    for part in ffn.parts:
        values = part.value_matrix().detach().mT
        for matrix in values if values.ndim == 3 else (values,):
            for block in matrix.split(VECTORS_AT_ONCE):
                yield start, block
                start += len(block)


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm after the last layer: the last norm among the siblings of the layers, identity if none."""
    siblings = model.get_submodule(layer_stack(model)[0].rpartition(".")[0]).children()
    norms = [child for child in siblings if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()


class LogitLens:
    """Final norm and LM head of a model, applied to any vectors.

    Attributes:
        norm: the final norm.
        narrow: projection between norm and head; only OPT-350m has one.
        weight: of the head, (vocabulary, width); a dense copy if the weight is packed or offloaded.
        bias: of the head, (vocabulary,) or None.

    Raises:
        ModelError: the model has no LM head.
    """

    def __init__(self, base: Base) -> None:
        head = base.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(base.model).__name__} has no LM head", hint="Give a causal language model.")
        self.norm = final_norm(base.model)
        parent = layer_stack(base.model)[0].rpartition(".")[0]
        self.narrow = getattr(base.model.get_submodule(parent), "project_out", None)
        self.weight = dense(stored_values(head)).detach()
        self.bias = stored_bias(head)
        self.device = self.weight.device
        self._compute_dtype = _compute_dtype(self.weight)
        self._tokenizer = base.tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """Text of one token; each token is decoded once."""
        if token not in self._texts:
            self._texts[token] = token_text(self._tokenizer, token)
        return self._texts[token]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Texts of all tokens."""
        return Vocabulary([self.text(token) for token in range(len(self.weight))])

    def hidden(self, vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Input of the head for vectors (n, d): (n, width of the head), in the dtype of the products.

        Args:
            dtype: also of the norm. Default: that of the weights for the norm, `_compute_dtype` for the products.
        """
        hidden = vectors if dtype is None else vectors.to(dtype)
        for module in (self.norm, self.narrow):
            if module is not None:
                loaded = [] if dtype is None else [each for each in module.named_parameters() if not each[1].is_meta]
                weights = {name: weight.to(dtype) for name, weight in loaded}
                with torch.no_grad():
                    hidden = functional_call(module, weights, (hidden,))
        # With a device map the head may run on another device than the norm.
        return hidden.detach().to(self.device, dtype or self._compute_dtype)

    def blocks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (first token, scores (n, tokens)) that together cover the vocabulary.

        The scores are overwritten by those of the next block.
        """
        # One buffer for all blocks: page faults of fresh memory would take a share of the product's time.
        buffer = hidden.new_empty(len(hidden), min(_TOKENS_AT_ONCE, len(self.weight)))
        for start in range(0, len(self.weight), _TOKENS_AT_ONCE):
            weight = self.weight[start : start + _TOKENS_AT_ONCE].to(hidden.dtype)
            scores = buffer if len(weight) == buffer.shape[1] else hidden.new_empty(len(hidden), len(weight))
            torch.mm(hidden, weight.mT, out=scores)
            if self.bias is not None:
                scores.add_(self.bias[start : start + _TOKENS_AT_ONCE].to(scores))
            yield start, scores

    def best(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores (n, k) in float32 and tokens (n, k), best first; of equal listed scores the lower token first."""
        parts = []
        for block in vectors.split(VECTORS_AT_ONCE):
            found = []
            for start, scores in self.blocks(self.hidden(block)):
                best = scores.topk(min(k, scores.shape[1]), dim=1)
                found.append((best.values.float(), start + best.indices))
            values, ids = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            ids = ids.gather(1, order)
            # topk returns equal scores in any order.
            ids, order = ids.sort(dim=1)
            values, place = values.gather(1, order).sort(dim=1, descending=True, stable=True)
            parts.append((values, ids.gather(1, place)))
        return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])

    def best_tokens(self, vectors: Tensor, k: int) -> list[list[dict[str, Any]]]:
        """The k best tokens of each vector (n, d) as `{id, token, score}`, best first."""
        scores, ids = self.best(vectors, k)
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        return [[{"id": t, "token": self.text(t), "score": s} for t, s in zip(*row, strict=True)] for row in pairs]

    def ranks(self, vectors: Tensor, tokens: Sequence[int], most: float = math.inf) -> tuple[Tensor, Tensor]:
        """Rank of each token among all tokens, from 1, and its score, both (n, tokens).

        Computed in float32, since half precision has many equal scores; of these the lower token is ahead. Ranks of a
        vector that are all above `most` are only known to be so.
        """
        chosen = torch.tensor(tokens, device=self.device)
        ranks, own_scores = [], []
        for block in vectors.split(VECTORS_AT_ONCE):
            hidden = self.hidden(block, torch.float32)
            own = hidden @ self.weight[chosen].to(hidden.dtype).mT
            if self.bias is not None:
                own = own + self.bias[chosen].to(own)
            rank = torch.ones(own.shape, dtype=torch.int64, device=own.device)
            rows = torch.arange(len(hidden), device=own.device)
            for start, scores in self.blocks(hidden):
                scores = scores if len(rows) == len(scores) else scores[rows]
                for column, token in enumerate(tokens):
                    # A token is not compared with itself: a product of another shape is rounded differently.
                    lower, higher = scores[:, : max(token - start, 0)], scores[:, max(token - start + 1, 0) :]
                    score = own[rows, column, None]
                    ahead = (lower >= score).sum(dim=1, dtype=torch.int32) + (higher > score).sum(
                        dim=1, dtype=torch.int32
                    )
                    rank[rows, column] += ahead
                rows = rows[rank[rows].amin(dim=1) <= most]
            ranks.append(rank)
            own_scores.append(own)
        return torch.cat(ranks), torch.cat(own_scores)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """float32 for half-precision weights on a CPU without instructions for them, where it is several times faster."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.dtype
    # Older releases of torch have no `get_capabilities`.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return weight.dtype if weight.dtype == torch.bfloat16 and capabilities.get("avx512_bf16") else torch.float32


def value_tokens(
    lens: LogitLens,
    ffns: Sequence[FFN | MixtureFFN],
    indices: Collection[int] | None = None,
    top_k: int = 10,
    report: Report = silent,
) -> Iterator[dict[str, Any]]:
    """Yield `{layer, index, tokens: [{id, token, score}]}` for each vector, tokens best first.

    Args:
        indices: vectors in each layer; None is all.
        top_k: tokens per vector.
    """
    chosen = None if indices is None else set(indices)
    for number, ffn in enumerate(ffns):
        report("reading value vectors, layers", number, len(ffns))
        for start, block in vector_blocks(ffn):
            rows = [i for i in range(len(block)) if chosen is None or start + i in chosen]
            if rows:
                vectors = block if len(rows) == len(block) else block[rows]
                for row, tokens in zip(rows, lens.best_tokens(vectors, top_k), strict=True):
                    yield {"layer": ffn.layer, "index": start + row, "tokens": tokens}


def map_header(base: Base, lens: LogitLens, top_k: int) -> dict[str, Any]:
    """Header of a map file; see `maps.Header`. It has the texts of all tokens, so that readers need no tokenizer."""
    return {
        "format_version": 1,
        "model": base.name,
        "revision": base.revision,
        "base": base.sizes,
        "tokenizer": base.tokenizer_hashes,
        "top_k": min(top_k, len(lens.weight)),
        "vocabulary": lens.vocabulary.texts,
    }
