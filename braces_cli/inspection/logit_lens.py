"""From a vector in the residual stream to vocabulary scores: final norm, then LM head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from braces_cli.core.models.ffn import layer_stack
from braces_cli.core.models.value_weights import at_hand, compute_device
from braces_cli.core.utils.errors import ModelError
from braces_cli.inspection.streaming_topk import TopK

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
