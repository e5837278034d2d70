"""A plan in plain words: what each pool answers, and what the answers cost."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from kvpolicy.language import Quantity
from kvpolicy.language.signals import definition
from kvpolicy.plan import LayerPlan, ModelGeometry, Plan, PoolPlan, ScorerPlan, needs, reads_bounds, scoring_leaves


def plural(number: int, noun: str) -> str:
    """`1 row`, `2,048 tokens`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def pool_answers(pool: PoolPlan, shape: ModelGeometry, budgets: list[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """The seven answers of a pool: (question, sentence). `budgets` is where its budget changes, as (t, tokens)."""
    unit = "page" if pool.page > 1 else "token"
    pages = f", in pages of {pool.page} in order of arrival" if pool.page > 1 else ""
    yield (
        "enters",
        (f"{listed(sorted(pool.admits, reverse=True))} tokens" if pool.admits else "what others send") + pages,
    )
    if pool.budget is None:
        yield "stays", "everything, for ever"
    else:
        yield "stays", budget_words(pool.budget, budgets)
        yield "safe", listed(list(_safe(pool))) if list(_safe(pool)) else f"no {unit}"
        yield "ranked", f"{scorer_words(pool.scorer, shape)}; of equals the older is lower"
        yield "goes", f"the lowest {unit} {f'moves to {pool.to}' if pool.to else 'is dropped'}, {_scope(pool)}"
        yield "when", cadence_words(pool)
    if pool.read is None:
        yield "read", "all of it, at every step"
    else:
        best = scorer_words(pool.read.scorer, shape)
        yield "read", f"{pool.read.top.text} tokens a step, the newest {unit} and the best by: {best}"
    if pool.store is None:
        yield "stored", f"as {shape.dtype}, one key and one value per KV head"
    else:
        groups = f"{pool.store.group} numbers to a scale"
        yield "stored", f"in {pool.store.bits} bits, {groups}, keys by {pool.store.keys}, values by {pool.store.values}"


def _scope(pool: PoolPlan) -> str:
    if pool.scope == "layer":
        return "the same in all KV heads of a layer, by their mean score"
    if pool.scope == "across-heads":
        return f"KV heads compete, and each keeps {float(pool.floor):.0%} of its budget in any case"
    return "each KV head for itself"


def budget_words(budget: Quantity, budgets: list[tuple[int, int]]) -> str:
    """A budget as its formula, and what that is at these lengths."""
    if budget.constant is not None:
        return plural(max(0, int(budget.constant)), "token")
    if not budgets:
        return f"{budget.text} tokens"
    if len(budgets) == 1:
        return f"{budget.text} = {plural(budgets[0][1], 'token')}"
    (begin, least), (end, most) = budgets[0], budgets[-1]
    return f"{budget.text} tokens: {least:,} at t = {begin:,}, {most:,} from t = {end:,} on"


def cadence_words(pool: PoolPlan) -> str:
    """When a pool is updated."""
    if pool.cadence == 0:
        return "at the end of a prompt, never after"
    if pool.cadence == 1:
        return "at the end of a prompt, and at every step"
    return f"at the end of a prompt, and at every step whose t is a multiple of {pool.cadence}"


def _safe(pool: PoolPlan) -> Iterator[str]:
    if pool.first is not None:
        yield f"the first {pool.first.text}"
    if pool.window is not None:
        yield f"the newest {pool.window.text}"
    if pool.pin_survivors:
        yield "all that survived an update"
    if pool.pin_special:
        yield "special tokens"
    if pool.page > 1:
        yield "the newest page"


QUERIES = {"current": "the newest query", "all": "every query of a pass, summed"}
RANKED = {"cache": "the whole cache", "pool": "this pool", "candidates": "the unprotected of this pool"}
NORMS = {
    "max": "divided by the largest",
    "softmax": "through a softmax over the unprotected",
    "mass": "times the share of the scores that the kept ones hold",
}
MEMORIES = {
    "sum": "summed over time",
    "last-hit": "the score is the t of the last hit, or of entry",
    "decay": "summed over time, the sum so far times {} each pass",
    "max-decay": "the larger of now and {} times before",
    "recurrence": "by how overdue the next hit is against the longest gap so far, a bonus of {} for short gaps",
}


def scorer_words(scorer: ScorerPlan, shape: ModelGeometry) -> str:
    """A scorer's stages in the order in which they work."""
    if scorer.op != "leaf":
        parts = [f"({scorer_words(part, shape)})" for part in scorer.parts]
        joined = (" plus " if scorer.op == "sum" else " times ").join(parts)
        return joined if scorer.weight == 1 else f"{_number(scorer.weight)} times ({joined})"
    return ", ".join(_stages(scorer, shape))


def _stages(leaf: ScorerPlan, shape: ModelGeometry) -> Iterator[str]:
    signal = definition(leaf.signal)
    arguments = ", ".join(f"{key} {_number(value)}" for key, value in leaf.args)
    name = leaf.signal + (f" with {arguments}" if arguments else "")
    yield f"{name} ({signal.meaning})"
    if signal.queries:
        asked = QUERIES.get(str(leaf.queries), f"the newest {leaf.queries} queries, averaged")
        yield f"asked by {asked}"
        if leaf.over != "cache" and signal.softmax:
            yield f"its softmax over {RANKED[leaf.over]}"
        if shape.group > 1:
            reduced = "the logits' maximum" if leaf.heads == "logits-max" else f"the {leaf.heads}"
            yield f"{reduced} over the {shape.group} query heads of a KV head"
    if leaf.smooth:
        yield f"smoothed by the {leaf.smooth[0]} of {leaf.smooth[1]} neighbours"
    if leaf.norm:
        yield NORMS[leaf.norm]
    if leaf.hit:
        kind, value = leaf.hit
        if isinstance(value, Quantity):
            yield f"a hit where among the best {value.text} of {RANKED[leaf.over]}"
        else:
            yield f"a hit where {kind} {_number(value)}"
    if leaf.remembers:
        yield MEMORIES[leaf.memory[0]].format(_number(leaf.memory[1]))
    if leaf.weight != 1:
        yield f"times {_number(leaf.weight)}"


def _number(value: object) -> str:
    return f"{float(value):g}" if isinstance(value, Fraction) else str(value)


# Costs -----------------------------------------------------------------------------------------------------------


def costs(plan: Plan, layer: LayerPlan) -> Iterator[str]:
    """What the scorers of a layer need, and what that costs; nothing where attention runs as it would without them."""
    shape = plan.geometry
    leaves = [(pool, leaf) for pool in layer.pools for leaf in scoring_leaves(pool)]
    readers = {need: [pair for pair in leaves if need in needs(pair[1].signal)] for need in ("logits", "bounds")}
    generated = [(pool, leaf) for pool, leaf in readers["logits"] if pool.cadence]
    if generated:
        every = any(leaf.remembers or pool.cadence == 1 for pool, leaf in generated)
        steps = "each step" if every else "steps with an update"
        yield f"the logits of {steps}: attention is computed in the open, not fused"
    if any(leaf.queries == "all" for _, leaf in readers["logits"]):
        yield "column sums of the prompt's attention: its logits a second time, in tiles, never whole"
    elif any(pool.hears_prompts for pool, _ in readers["logits"]):
        yield "the prompt's attention for its newest queries alone"
    if readers["bounds"]:
        kept = sum(pool.units for pool in layer.pools if reads_bounds(layer, pool))
        size = 2 * kept * shape.head_dim
        yield f"page bounds: two vectors per page and KV head ({size:,} numbers), and a product with them at every step"
    for signal in sorted({leaf.signal for _, leaf in leaves}):
        stored = listed(sorted(needs(signal) & {"keys", "values"}))
        if stored:
            yield f"{signal}: a pass over the stored {stored} at each update"
