"""What files hold of the fingerprint of a base (`core.models.identity`). No torch here."""

from __future__ import annotations

from typing import TypedDict

from braces_cli.core.schema import Count, Size


class Fingerprint(TypedDict):
    """Sizes of a base and a hash over sampled bytes of it; no hash where no weights were at hand."""

    model_type: str
    layers: Count
    hidden_size: Size
    value_vectors: list[Count]
    sha256: str | None


# Of a base that nobody has looked at yet.
UNKNOWN = Fingerprint(model_type="", layers=0, hidden_size=0, value_vectors=[], sha256=None)
