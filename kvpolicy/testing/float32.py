"""How close two scores must be for float32 to mistake their order.

The bound is ``RELATIVE`` = 2**-14 of the scores compared. float32 rounds to 2**-24; a scaled logit of magnitude 32, as
a dot product of some tens of terms, is off by up to about 2**-17, which the softmax turns into a relative error of the
same size, and sums over queries, heads and steps add little: this leaves a factor of 8. Scores that are differences
(logits, page bounds, cosines, weighted sums) can be small while their terms are not, so there the bound is the same
share of the greatest candidate's. Below ``LEAST`` float32 has few numbers left, or none: of a softmax that is steep
enough it knows many weights as 0 which in float64 are not. Whole numbers and drawn ones have no bound: float32 holds
them exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvpolicy.oracle import Hit
from kvpolicy.plan import ScorerPlan

RELATIVE = 2.0**-14

STEEP = 128.0
"""Scaled logits of real models stay below this, or near it. A logit m is off by up to some m * 2**-24 in float32, and
the attention it makes by as large a share."""

LEAST = 2.0**-120
"""Somewhat above 2**-126, the least normal number, since products and sums of a few such are compared too."""


OWN = ("attention", "gumbel-attention", "above-average", "key-norm", "value-norm")
"""Signals whose numbers float32 holds up to a share of their own."""


def boundary(hit: Hit, leaf: ScorerPlan, relative: float) -> set[int]:
    """Units that float32 may put on the other side of the cut between hits and the others.

    Where the signal itself decides, what follows may carry one unit's doubt to all.
    """
    kind, scores = signal_grain(leaf), hit.scores
    if hit.signal:
        unsure = {unit for unit in scores if abs(scores[unit] - 1) <= relative}
        spreads = leaf.smooth is not None or leaf.norm is not None or (leaf.hit is not None and leaf.hit[0] == "top")
        return set(scores) if unsure and spreads else unsure
    if kind == "exact":
        return set()
    if hit.bar is not None:
        bar = {-1: hit.bar}
        return {unit for unit in scores if abs(scores[unit] - hit.bar) <= bound(kind, relative, scores | bar, unit, -1)}
    others = scores.keys() - hit.hits
    if not others or not hit.hits:
        return set()
    lowest, highest = min(hit.hits, key=scores.__getitem__), max(others, key=scores.__getitem__)
    across = {unit: highest if unit in hit.hits else lowest for unit in scores}
    return {
        u for u, other in across.items() if abs(scores[u] - scores[other]) <= bound(kind, relative, scores, u, other)
    }


def signal_grain(leaf: ScorerPlan) -> str:
    """How float32 holds a score before hit and memory: exactly, or up to a share of its own or of the greatest."""
    if leaf.norm == "softmax" or leaf.signal in OWN:
        return "own"
    if leaf.signal == "lag" and (leaf.smooth or leaf.norm or leaf.memory[0] not in ("none", "last-hit")):
        return "greatest"  # ranks below 0 and ones above it: a mean or a sum of them can be small
    if leaf.signal in ("recency", "random", "lag"):
        return "exact" if leaf.smooth is None and leaf.norm is None else "own"
    return "greatest"


def grain(scorer: ScorerPlan) -> str:
    """The same of a whole scorer."""
    if scorer.op == "leaf":
        if scorer.hit is None:
            return signal_grain(scorer)
        return "exact" if scorer.memory[0] in ("none", "sum", "last-hit") else "own"
    parts = {grain(part) for part in scorer.parts}
    return "own" if scorer.op == "product" and "greatest" not in parts else "greatest"


def bound(kind: str, relative: float, scores: Mapping[int, float], a: int, b: int) -> float:
    """How far apart two scores may be and yet change places in float32."""
    if kind == "greatest":
        return max(LEAST, relative * max(abs(score) for score in scores.values()))
    return max(LEAST, relative * max(abs(scores[a]), abs(scores[b])))
