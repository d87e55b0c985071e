"""What differs between two models, or between two adapters."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from scipy.linalg import subspace_angles

from braces_cli.core.method.adapter_files import CONFIG_FILE, AdapterConfig, find_adapter
from braces_cli.core.method.relevance_forms import QUERY_FORMS, gate_strength
from braces_cli.core.models.ffn import find_ffns
from braces_cli.core.models.load_options import LoadOptions
from braces_cli.core.models.loading import load_shape, load_tokenizer, tokenizer_hashes
from braces_cli.core.session import open_session
from braces_cli.core.utils.errors import ConfigError, ModelError
from braces_cli.core.utils.paths import user_path
from braces_cli.core.utils.progress import Report, silent
from braces_cli.inspection.ffn_weights import plain_ffns, side_vectors, sides_of
from braces_cli.inspection.logit_lens import LogitLens


def is_adapter(name: str) -> bool:
    """Whether `name` is the folder of an adapter; a hub id counts as a model."""
    return os.path.isfile(user_path(name) / CONFIG_FILE)  # pathlib's would raise where the name is too long


def diff(a: str, b: str, options: LoadOptions, *, adapters: bool = False, report: Report = silent) -> dict[str, Any]:
    """Compare two models or two adapters.

    Args:
        adapters: `a` and `b` are adapters, hub ids too.

    Raises:
        ConfigError: one is a model, the other an adapter.
        ModelError: either is neither of the two, or cannot be loaded, or the two cannot be compared.
    """
    kinds = [adapters or is_adapter(name) for name in (a, b)]
    if all(kinds):
        return diff_adapters(a, b)
    for name, adapter in zip((a, b), kinds, strict=True):
        if not adapter and os.path.isfile(user_path(name)):
            hint = "Give two models or two adapters."
            raise ModelError("this is a file, neither a model nor an adapter", where=name, hint=hint)
    if any(kinds):
        hint = "Give two models or two adapters."
        raise ConfigError("one is an adapter, the other a model", where=f"{a}, {b}", hint=hint)
    return diff_models(a, b, options, report)


def diff_models(a: str, b: str, options: LoadOptions, report: Report = silent) -> dict[str, Any]:
    """`{models, same_top_token, compared, layers: [{layer, side, same_top_token, compared}]}`: the share of vectors
    whose best token is the same. One model is in memory at a time.

    Raises:
        ModelError: other vocabularies or other sizes.
    """
    _check_comparable(a, b, options)
    first, second = _best_tokens(a, options, report), _best_tokens(b, options, report)
    layers: list[dict[str, Any]] = []
    same, compared = 0, 0
    for layer, side in first:
        equal = first[layer, side] == second[layer, side]
        share = float(equal.double().mean())
        layers.append({"layer": layer, "side": side, "same_top_token": share, "compared": len(equal)})
        same, compared = same + int(equal.sum()), compared + len(equal)
    return {"models": [a, b], "same_top_token": same / compared, "compared": compared, "layers": layers}


def _check_comparable(a: str, b: str, options: LoadOptions) -> None:
    """Before minutes of loading: the vocabularies and the sizes, which need no weights."""
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    where = f"{a}, {b}"
    words = [tokenizer_hashes(load_tokenizer(name, **source))["vocabulary"] for name in (a, b)]
    if words[0] != words[1]:
        raise ModelError("the models have different vocabularies", where=where, hint="Their tokens are no same things.")
    sizes = []
    for name in (a, b):
        shape = load_shape(name, **source)
        sizes.append([(f.layer, f.hidden_size, f.value_vectors, sides_of(f)) for f in plain_ffns(find_ffns(shape))])
    if sizes[0] != sizes[1]:
        raise ModelError("the models have different sizes", where=where, hint="Vector j must be vector j in both.")


def _best_tokens(name: str, options: LoadOptions, report: Report) -> dict[tuple[int, str], torch.Tensor]:
    """The best token of each vector, by layer and side; nothing else of the model is kept."""
    session = open_session(name, None, options)
    lens = LogitLens(session.base.model)
    best = {}
    for done, ffn in enumerate(plain_ffns(session.ffns), 1):
        for side in sides_of(ffn):
            best[ffn.layer, side] = lens.best(side_vectors(ffn, side), 1)[1][:, 0].cpu()
        report(f"reading vectors: {name}", done, len(plain_ffns(session.ffns)))
    return best


def diff_adapters(a: str, b: str) -> dict[str, Any]:
    """`{adapters, same_top_token: None, compared, layers: [{layer, gate_a, gate_b, angles, overlap}]}`.

    `angles` are the principal angles between the two subspaces in degrees, largest first: all 0 where one holds the
    other, 90 where they have nothing in common; `overlap` is the mean of their squared cosines. Where either adapter
    projects queries apart there are `query_angles` and `query_overlap` of these, too. A layer that only one adapter
    has carries None for the other. `compared` counts layers that both have. Needs no base.

    Raises:
        ModelError: either cannot be read, or they belong to other bases.
    """
    stored = [find_adapter(name) for name in (a, b)]
    configs = [each.config for each in stored]
    if configs[0].fingerprint.get("hidden_size") != configs[1].fingerprint.get("hidden_size"):
        hint = "They belong to bases of other hidden sizes."
        raise ModelError("the adapters do not live in the same space", where=f"{a}, {b}", hint=hint)
    tensors = [each.tensors for each in stored]
    queries = any(config.relevance in QUERY_FORMS for config in configs)
    layers = []
    for layer in sorted({*configs[0].layers, *configs[1].layers}):
        gates = [t.get(f"layers.{layer}.gate") for t in tensors]
        keys = [t.get(f"layers.{layer}.projection") for t in tensors]
        layers.append(
            {
                "layer": layer,
                "gate_a": _gate(configs[0], gates[0]),
                "gate_b": _gate(configs[1], gates[1]),
                **_compared("", *keys),
            }
        )
        if queries:
            # A form with one projection for both has its queries there.
            apart = [t.get(f"layers.{layer}.query_projection", k) for t, k in zip(tensors, keys, strict=True)]
            layers[-1] |= _compared("query_", *apart)
    compared = sum(row["angles"] is not None for row in layers)
    same_base = configs[0].fingerprint == configs[1].fingerprint
    return {
        "adapters": [a, b],
        "same_base": same_base,
        "same_top_token": None,
        "compared": compared,
        "layers": layers,
    }


def _compared(kind: str, one: torch.Tensor | None, other: torch.Tensor | None) -> dict[str, Any]:
    """Angles and overlap of two projections (d_r, d), None where one is missing."""
    if one is None or other is None:
        return {f"{kind}angles": None, f"{kind}overlap": None}
    angles = subspace_angles(one.double().numpy().T, other.double().numpy().T).tolist()
    overlap = sum(math.cos(x) ** 2 for x in angles) / len(angles)
    return {f"{kind}angles": [math.degrees(angle) for angle in angles], f"{kind}overlap": overlap}


def _gate(config: AdapterConfig, gate: torch.Tensor | None) -> float | None:
    return None if gate is None else gate_strength(config.relevance, gate)
