"""Ways to steer side by side at equal perplexity: how far each moves the score before the language costs so much.

From s = 0 outwards, on each side of it, a method's points are joined by lines in the logarithm of the perplexity. The
score at a perplexity is where such a line first reaches it; a method that never costs so much has the score of its
outermost point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Of the unsteered perplexity.
RATIOS = (1.25, 1.5, 2.0)
BRACES_METHOD = "braces"


def at_equal_perplexity(swept: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows `{method, side, ratio, attribute_score, s, reached}` of a sweep with baselines.

    `side` is the sign of s; `reached` says whether the method has points of that perplexity. What has no point on a
    side has no row there.
    """
    unsteered = swept["unsteered"]
    methods = [(BRACES_METHOD, swept["points"]), *((each["method"], each["points"]) for each in swept["baselines"])]
    return [
        {"method": name, "side": side, "ratio": ratio, **row}
        for ratio in RATIOS
        for side in (1, -1)
        for name, points in methods
        if (row := _score(unsteered, points, side, ratio * unsteered["perplexity"])) is not None
    ]


def _score(
    unsteered: dict[str, Any], points: Sequence[dict[str, Any]], side: int, perplexity: float
) -> dict[str, Any] | None:
    outwards = sorted((each for each in points if each["s"] * side > 0), key=lambda each: abs(each["s"]))
    if not outwards:
        return None
    last = {**unsteered, "s": 0.0}
    for each in outwards:
        if each["perplexity"] > perplexity:
            low, high = math.log(last["perplexity"]), math.log(each["perplexity"])
            way = (math.log(perplexity) - low) / (high - low)
            score, s = (last[key] + way * (each[key] - last[key]) for key in ("attribute_score", "s"))
            return {"attribute_score": score, "s": s, "reached": True}
        last = each
    return {"attribute_score": last["attribute_score"], "s": last["s"], "reached": False}
