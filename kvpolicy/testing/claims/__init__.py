"""The claims of a ``tests:`` block: what a policy must keep, drop and hold, judged after every pass of every KV head.

Numbers are positions. A moment is named by the newest token then: `until: 90` and `by: 90` both mean the pass that
admits the token at position 90, its update included; the whole prompt is one moment, that of its last token. A claim
holds in every layer, KV head and row; `layer`, `head` and `row` (a number or a list) narrow it down, `pool` to one
pool. A claim is written `{keeps: 40, until: 90}` or, with more to say, `{keeps: {tokens: 40, until: 90, layer: 0}}`.
"""

from __future__ import annotations

from kvpolicy.testing.claims import counts, mass, tokens
from kvpolicy.testing.claims.base import CLAIMS, Breach, Claim, Moments
from kvpolicy.testing.claims.tokens import Which

__all__ = ["CLAIMS", "Breach", "Claim", "Moments", "Which", "counts", "mass", "tokens"]
