"""All rows and layers of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from kvpolicy.oracle.records import Step
from kvpolicy.oracle.step import Kept, Memories, OracleLayer
from kvpolicy.oracle.text import Array, Formula, Rotate
from kvpolicy.plan import Plan

T = TypeVar("T")


class Oracle:
    """All rows and layers of a plan.

    Args:
        rotate: (vectors [..., n, D], positions [n]) -> the vectors turned to those positions; for, and only for, a
            policy with ``positions: compact``, whose queries and keys are then given unrotated.
    """

    def __init__(self, plan: Plan, *, rows: int = 1, rotate: Rotate | None = None) -> None:
        if (plan.policy.positions == "compact") != (rotate is not None):
            raise ValueError("a policy with positions: compact, and no other, needs rotate(vectors, positions)")
        self.plan = plan
        self.layers = [[OracleLayer(plan, layer.index, row, rotate) for row in range(rows)] for layer in plan.layers]

    def step(
        self,
        layer: int,
        queries: Sequence[Array] | None,
        keys: Sequence[Array] | None,
        values: Sequence[Array] | None = None,
        *,
        kind: str | None = None,
        more: bool = False,
        special: Sequence[Sequence[bool]] | None = None,
        modality: Sequence[Sequence[str | None]] | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
        logits: Sequence[Array] | None = None,
    ) -> list[Step]:
        """One pass of one layer. Everything is given as one item a row, of that row's own N_b tokens, no padding.

        Args:
            queries, keys, values: [Q, N_b, D], [K, N_b, D], [K, N_b, D]. A row may bring no token (N_b = 0).
            kind: "prompt" or "generated"; by itself, one token a row on texts that have begun is generated.
            more: the prompt turn goes on with the next pass.
            special, modality: flags of the new tokens; what a generated pass is given counts for nothing.
            scaling: the factor of q.k, D ** -0.5 unless given.
            softcap: c makes scaled logits c * tanh(logits / c).
            sinks: [Q], a logit of each query head that takes part in the softmax and is no token's.
            logits: [Q, N_b, all positions of the row so far], scaled, in place of q.k (of probabilities, take the
                logarithm). Keys and values may be given as well, for the signals that read these.
        """
        rows = self.layers[layer]
        if kind is None:
            given = keys if keys is not None else logits if logits is not None else ()
            one_each = all(array.shape[1] == 1 for array in given) and all(row.text.length for row in rows)
            kind = "generated" if one_each and not more and not any(row.in_turn for row in rows) else "prompt"
        if kind not in ("prompt", "generated"):
            raise ValueError(f"a pass is 'prompt' or 'generated', not {kind!r}")
        return [
            row.step(
                _of(queries, number),
                _of(keys, number),
                _of(values, number),
                kind=kind,
                more=more,
                special=_of(special, number),
                modality=_of(modality, number),
                formula=Formula(scaling, softcap, sinks),
                logits=_of(logits, number),
            )
            for number, row in enumerate(rows)
        ]

    def adopt(self, layer: int, row: int, kept: Kept | None, memory: Memories | None = None) -> Step:
        """Do the last update of a row again so that ``kept`` stays, where the oracle has a choice at all.

        Protected units stay and absent ones stay away whatever ``kept`` says: compare the step that is returned.
        ``memory`` is put in place of the oracle's own before the update; with ``kept`` None the scores choose.
        """
        return self.layers[layer][row].adopt(kept, memory)

    def adopt_reading(self, layer: int, row: int, read: Sequence[Mapping[str, frozenset[int]]]) -> Step:
        """Do the last pass of a row again, from attention on, as if it had read other units: per KV head, of the pools
        named the positions read."""
        return self.layers[layer][row].adopt_reading(read)

    def memories(self, layer: int, row: int) -> Memories:
        """What the units of a row remember after the last pass (not yet anything for one that no scorer has seen)."""
        return self.layers[layer][row].memories()


def _of(items: Sequence[T] | None, row: int) -> T | None:
    return None if items is None else items[row]
