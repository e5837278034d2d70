"""Why a KV head holds what it holds after a pass, for a reader."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.oracle import Choice, PoolStep
from kvpolicy.testing.seen import Seen
from kvpolicy.testing.tokens import spelled

MOST = 16
"""Scores shown."""


def explain(seen: Seen, tokens: frozenset[int]) -> Iterator[str]:
    """Where and when this is, then each pool: what it keeps, its budget, what is protected, what went and why.

    ``tokens`` are those concerned; their units' scores are always among those shown.
    """
    step = seen.step
    layer, row, head = seen.place
    what = "prompt" if step.kind == "prompt" else "generated token"
    yield f"at position {seen.newest} (t {step.t}, {what}), layer {layer}, row {row}, KV head {head}"
    for name, pool in step.heads[seen.head].items():
        yield f"  pool {name} keeps {len(pool.kept)} tokens: {spelled(pool.kept)}"
        yield from (f"    {line}" for line in _reasons(pool, seen.plans[name].evicts, tokens))


def _reasons(pool: PoolStep, evicts: bool, tokens: frozenset[int]) -> Iterator[str]:
    choice = pool.choice
    if choice is None:
        yield "not updated in this pass" if evicts else "has no budget: nothing leaves it"
        return
    yield f"budget {choice.budget}; protected: {spelled(pool.protected)}"
    yield f"left in this pass: {spelled(pool.evicted)}"
    if choice.scores:
        yield f"scores of units (named by their first tokens), lowest first: {_scores(choice, tokens)}"


def _scores(choice: Choice, tokens: frozenset[int]) -> str:
    """The lowest scores, and those of the units that hold ``tokens``; `<` marks what left."""
    ranking = sorted(choice.scores, key=lambda unit: (choice.scores[unit], unit))
    units = choice.scores.keys() | choice.protected
    asked = {max((unit for unit in units if unit <= token), default=-1) for token in tokens}
    shown = [unit for place, unit in enumerate(ranking) if place < MOST or unit in asked]
    left = ", ".join(f"{unit}: {choice.scores[unit]:.6g}{' <' if unit in choice.dropped else ''}" for unit in shown)
    hidden = len(ranking) - len(shown)
    return f"{left}, and {hidden} more" if hidden else left
