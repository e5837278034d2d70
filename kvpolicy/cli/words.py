"""A plan in plain words: what each pool answers, and how its slots lie."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from kvpolicy.language import Quantity
from kvpolicy.plan import LayerPlan, PoolPlan, ScorerPlan, layer_needs

COSTS = {
    "logits": "the step's own logits",
    "bounds": "the extremes of each page's keys",
    "drawn": "a number drawn at entry",
    "keys": "the stored keys",
    "values": "the stored values",
}
MARKS = "█▓▒░"
"""Marks of pools in the picture of the slots, in reading order, over again where there are more."""


def pool_answers(pool: PoolPlan) -> Iterator[tuple[str, str]]:
    """The seven answers of a pool: (question, answer)."""
    yield (
        "who enters",
        f"{' and '.join(sorted(pool.admits, reverse=True))} tokens" if pool.admits else "what others send",
    )
    if pool.budget is None:
        yield "how many may stay", "all"
        if pool.page > 1:
            yield "pages", f"{pool.page} tokens each"
        return
    yield "how many may stay", budget_words(pool.budget)
    safe = list(_safe(pool))
    yield "who is safe", "; ".join(safe) if safe else "nobody"
    yield "how the others are ranked", scorer_words(pool.scorer)
    unit = "page" if pool.page > 1 else "token"
    where = f"moves to {pool.to}" if pool.to else "is dropped"
    scope = {"kv-head": "per KV head", "layer": "one set per layer", "across-heads": "heads compete"}[pool.scope]
    yield "who goes", f"the lowest {unit} {where}, {scope}"
    yield "when", cadence_words(pool)
    if pool.page > 1:
        yield "pages", f"{pool.page} tokens each"
    if pool.read is not None:
        yield "what is read", f"the best {pool.read.top.text} tokens, by {scorer_words(pool.read.scorer)}"
    if pool.store is not None:
        yield "how it is stored", f"{pool.store.bits} bits, groups of {pool.store.group}"


def budget_words(budget: Quantity) -> str:
    """A budget as a number or as the formula it is."""
    return f"{int(budget.constant)} tokens" if budget.constant is not None else f"{budget.text} tokens"


def cadence_words(pool: PoolPlan) -> str:
    """When a pool is updated."""
    if pool.cadence == 0:
        return "at the end of a prompt only"
    if pool.cadence == 1:
        return "at every step, and at the end of a prompt"
    return f"at every step whose number is a multiple of {pool.cadence}, and at the end of a prompt"


def _safe(pool: PoolPlan) -> Iterator[str]:
    if pool.first is not None:
        yield f"the first {pool.first.text}"
    if pool.window is not None:
        yield f"the newest {pool.window.text}"
    if pool.pin_survivors:
        yield "who survived an update"
    if pool.pin_special:
        yield "special tokens"
    if pool.page > 1:
        yield "the newest page"


def scorer_words(scorer: ScorerPlan) -> str:
    """A scorer's stages in the order in which they work."""
    if scorer.op != "leaf":
        joined = (" + " if scorer.op == "sum" else " × ").join(scorer_words(part) for part in scorer.parts)
        return f"({joined})" if scorer.weight == 1 else f"{_number(scorer.weight)} × ({joined})"
    parts = [scorer.signal]
    if scorer.args:
        parts[0] += f" ({', '.join(f'{key} {_number(value)}' for key, value in scorer.args)})"
    if scorer.signal in ("attention", "attention-logit", "page-bound"):
        queries = {"current": "of the newest query", "all": "of every query, summed"}
        parts[0] += f" {queries.get(str(scorer.queries), f'of the newest {scorer.queries} queries')}"
        parts.append(f"{scorer.heads} over the group's heads")
    if scorer.smooth:
        parts.append(f"{scorer.smooth[0]} over {scorer.smooth[1]} neighbours")
    if scorer.norm:
        parts.append(f"normalised by {scorer.norm}")
    if scorer.hit:
        kind, value = scorer.hit
        parts.append(f"a hit if in the top {value.text}" if isinstance(value, Quantity) else f"a hit if {kind} {value}")
    if scorer.remembers:
        kind, number = scorer.memory
        parts.append(f"remembered as {kind}" + ("" if number is None else f" {_number(number)}"))
    if scorer.weight != 1:
        parts.append(f"times {_number(scorer.weight)}")
    return ", ".join(parts)


def _number(value: object) -> str:
    return f"{float(value):g}" if isinstance(value, Fraction) else str(value)


def needs_words(layer: LayerPlan) -> str:
    """What the scorers of a layer read, in words."""
    needs = [COSTS[need] for need in sorted(layer_needs(layer))]
    sums = any(leaf.queries == "all" for pool in layer.pools if pool.evicts for leaf in pool.scorer.leaves())
    if sums:
        needs.append("column sums of the prompt, in tiles")
    return ", ".join(needs) if needs else "nothing: attention runs as it is"


def slot_bar(layer: LayerPlan, width: int = 64) -> str:
    """The layer's slots in a row: each pool by its mark, the room between two updates as dots."""
    bar = ""
    for index, pool in enumerate(layer.pools):
        cells = max(1, round(width * pool.capacity / layer.slots))
        slack = 0 if pool.capacity == pool.bound else max(1, round(cells * (1 - pool.bound / pool.capacity)))
        bar += MARKS[index % len(MARKS)] * max(1, cells - slack) + "·" * slack
    return bar


def slot_legend(layer: LayerPlan) -> str:
    """What the marks of the bar stand for."""
    parts = [f"{MARKS[i % len(MARKS)]} {pool.name} {pool.bound}" for i, pool in enumerate(layer.pools)]
    room = layer.slots - layer.bound
    return "   ".join(parts + ([f"· room until the next update {room}"] if room else []))
