"""Every tensor the runtime allocates, by name, shape and type: printed by ``explain``, allocated as printed."""

from __future__ import annotations

from collections.abc import Iterator

from kvpolicy.plan.geometry import ModelGeometry
from kvpolicy.plan.signals import reads_bounds, scoring_leaves
from kvpolicy.plan.structure import Buffer, LayerPlan, LocalPlan, PoolPlan, Stream


def layer_buffers(layer: LayerPlan, geometry: ModelGeometry, batch: int) -> tuple[Buffer, ...]:
    """The layer's slots, then what each pool keeps about them."""
    heads = (batch, geometry.kv_heads)
    buffers = [
        Buffer("keys", (*heads, layer.whole_slots, geometry.head_dim), geometry.dtype),
        Buffer("values", (*heads, layer.whole_slots, geometry.head_dim), geometry.dtype),
        Buffer("position", (*heads, layer.slots), "int32"),
    ]
    if layer.window_queries:
        window = layer.window_queries
        buffers.append(Buffer("queries", (batch, geometry.query_heads, window, geometry.head_dim), geometry.dtype))
        buffers.append(Buffer("query_position", (batch, window), "int32"))
    for pool in layer.pools:
        buffers.extend(_pool_buffers(layer, pool, geometry, batch))
    return tuple(buffers)


def _pool_buffers(layer: LayerPlan, pool: PoolPlan, geometry: ModelGeometry, batch: int) -> Iterator[Buffer]:
    heads = (batch, geometry.kv_heads)
    units: tuple[int, ...] = (*heads, pool.units)
    slots: tuple[int, ...] = (*heads, pool.capacity)
    name = pool.name
    if pool.shared:
        slots, units = (batch, pool.capacity), (batch, pool.units)
        yield Buffer(f"{name}.keys", (*slots, geometry.head_dim), geometry.dtype)
        yield Buffer(f"{name}.values", (*slots, geometry.head_dim), geometry.dtype)
        yield Buffer(f"{name}.position", slots, "int32")
        yield Buffer(f"{name}.owner", slots, "int32")  # whose token it is: a KV head, -1 for none
    else:
        yield Buffer(f"{name}.ring", units, "int32")  # unit ids: the free ones, and behind them the open page's
        yield Buffer(f"{name}.tail", heads, "int64")  # where the next freed unit goes in the ring
        if pool.evicts:
            yield Buffer(f"{name}.peak", heads, "int64")
    if pool.fed:  # heads are sent different units, so each counts its own
        yield Buffer(f"{name}.opened", heads, "int64")
        yield Buffer(f"{name}.seen", heads, "int64")
    if pool.store is not None:
        yield from _stored_buffers(pool, geometry, batch)
    if pool.needs_ordinals:
        yield Buffer(f"{name}.ordinal", slots, "int32")
    if pool.pin_survivors and pool.evicts:
        yield Buffer(f"{name}.survivor", units, "bool")
    if pool.size_read:
        yield Buffer(f"{name}.size", heads, "int64")
    if reads_bounds(layer, pool):
        for side in ("high", "low"):
            yield Buffer(f"{name}.{side}", (*units, geometry.head_dim), geometry.dtype)
    for number, leaf in enumerate(scoring_leaves(pool)):
        if leaf.signal == "random":
            yield Buffer(f"{name}.drawn.{number}", units, "float32")
        kind = leaf.memory[0]
        if kind in ("last-hit", "recurrence"):
            yield Buffer(f"{name}.memory.{number}", units, "int32")
        elif kind != "none":
            yield Buffer(f"{name}.memory.{number}", units, "float32")
        if kind == "recurrence":
            yield Buffer(f"{name}.gap.{number}", units, "int32")


def _stored_buffers(pool: PoolPlan, geometry: ModelGeometry, batch: int) -> Iterator[Buffer]:
    """Codes, a scale and a zero for each group, and the page that is still open (attention/quantised.py)."""
    store, size = pool.store, geometry.head_dim
    assert store is not None
    heads = (batch, geometry.kv_heads)
    scale = "float32" if geometry.dtype in ("float32", "float64") else "float16"
    for what, by in (("keys", store.keys), ("values", store.values)):
        name = f"{pool.name}.{what}"
        yield Buffer(f"{name}.codes", (*heads, pool.capacity, size * store.bits // 8), "uint8")
        groups = (pool.capacity // store.group, size) if by == "channel" else (pool.capacity, -(-size // store.group))
        yield Buffer(f"{name}.scale", (*heads, *groups), scale)
        yield Buffer(f"{name}.zero", (*heads, *groups), scale)
        if pool.stages:
            yield Buffer(f"{name}.open", (*heads, pool.page, size), geometry.dtype)


def local_plans(geometry: ModelGeometry, batch: int, tokens: int) -> tuple[LocalPlan, ...]:
    """The layers that no policy touches, for rows of at most so many tokens."""
    plans = []
    for layer in geometry.local:
        slots = max(1, min(layer.span, tokens))
        shape = (batch, geometry.kv_heads, slots, geometry.head_dim)
        numbers = (Buffer(name, shape, geometry.dtype) for name in ("keys", "values"))
        plans.append(LocalPlan(layer, slots, (*numbers, Buffer("position", (batch, slots), "int32"))))
    return tuple(plans)


def clock_buffers(streams: tuple[Stream, ...], batch: int, flagged: int) -> tuple[Buffer, ...]:
    """The clocks that all layers share: one set per row, and one per order of arrival.

    ``flagged``: for how many positions a row notes whether a special token stands there; 0 where no pin asks.
    """
    rows = (batch,)
    buffers = [Buffer("t", rows, "int64"), Buffer("prompt_len", rows, "int64"), Buffer("position", rows, "int32")]
    for number in range(len(streams)):
        buffers += [Buffer(f"{name}.{number}", rows, "int64") for name in ("seen", "fill", "opened")]
        buffers.append(Buffer(f"ordinal.{number}", rows, "int32"))
    if flagged:
        buffers.append(Buffer("special", (batch, flagged), "bool"))
    return tuple(buffers)
