"""The part of a plan that lies on one of several ranks: tensor parallelism gives each an even slice of the KV heads."""

from __future__ import annotations

from dataclasses import replace

from kvpolicy.errors import UsageError
from kvpolicy.plan.buffers import layer_buffers, local_plans
from kvpolicy.plan.geometry import ModelGeometry
from kvpolicy.plan.structure import Buffer, LayerPlan, Plan, PoolPlan


def on_rank(plan: Plan, rank: int, ranks: int) -> Plan:
    """What one of ``ranks`` processes allocates: the plan of its own heads, which keep the numbers of the whole model.

    Budgets, cadences, clocks and lengths are those of the whole plan.

    Raises:
        UsageError: the KV heads cannot be shared out evenly.
    """
    if ranks == 1:
        return plan
    geometry = plan.geometry
    if geometry.kv_heads % ranks:
        raise UsageError(uneven(geometry, ranks))
    count = geometry.kv_heads // ranks
    heads = range(rank * count, (rank + 1) * count)
    layers = tuple(_layer(layer, geometry, heads, plan.batch) for layer in plan.layers)
    own = geometry.of_heads(count)
    local = local_plans(own, plan.batch, plan.prompt[1] + plan.max_new_tokens)
    return replace(plan, geometry=own, layers=layers, local=local)


def uneven(geometry: ModelGeometry, ranks: int) -> str:
    """Why so many ranks cannot share this model, and how many can."""
    fit = [str(size) for size in range(2, geometry.kv_heads + 1) if geometry.kv_heads % size == 0]
    way_out = f"start {' or '.join(fit)} of them" if fit else "start one"
    heads = f"{geometry.kv_heads} KV head{'s' * (geometry.kv_heads != 1)}"
    return f"{ranks} ranks cannot share the {heads} of this {geometry.model_type} model evenly; {way_out}"


def _layer(layer: LayerPlan, geometry: ModelGeometry, heads: range, batch: int) -> LayerPlan:
    if not layer.groups:
        return _slice(layer, tuple(heads), geometry, batch)
    groups = []
    for group in layer.groups:
        members = tuple(head for head in group.members if head in heads)
        if members:
            groups.append(_slice(group, members, geometry, batch))
    buffers = [
        replace(buffer, name=f"heads {', '.join(map(str, group.members))}/{buffer.name}")
        for group in groups
        for buffer in group.buffers
    ]
    assert layer.heads is not None
    largest = max(groups, key=lambda group: group.slots)
    return replace(
        layer,
        pools=largest.pools,
        order=largest.order,
        groups=tuple(groups),
        heads=tuple(layer.heads[head] for head in heads),
        buffers=tuple(buffers),
    )


def _slice(layer: LayerPlan, members: tuple[int, ...], geometry: ModelGeometry, batch: int) -> LayerPlan:
    """A layer, or a group of its heads with equal pools, as far as these heads go."""
    pools, offset = list(layer.pools), 0
    for index, pool in sorted(enumerate(layer.pools), key=lambda place: place[1].offset):
        capacity = _of_some_heads(pool, geometry.kv_heads, len(members)) if pool.shared else pool.capacity
        pools[index] = replace(pool, capacity=capacity, offset=offset)
        offset += capacity
    part = replace(layer, pools=tuple(pools), members=members)
    buffers: tuple[Buffer, ...] = layer_buffers(part, geometry.of_heads(len(members)), batch)
    return replace(part, buffers=buffers)


def _of_some_heads(pool: PoolPlan, every: int, some: int) -> int:
    """The most tokens that so many of the heads keep together, whole pages, where heads win places from each other.

    They may win whatever the floor leaves to win, those of other ranks included, and have their own floors: slots for
    ``(1 - floor) K b + floor k b`` units, and half a unit a head for rounding.
    """
    rounds = 0 < pool.floor < 1
    mean = -(-(pool.units - (every // 2 if rounds else 0)) // every)
    won = (1 - pool.floor) * every * mean + pool.floor * some * mean
    most = (2 * won + (some if rounds else 0)) // 2
    return max(1, min(pool.units, int(most), some * (pool.bound // pool.page))) * pool.page


def gathered(plan: Plan) -> tuple[int, int]:
    """Bytes of scores that ranks put together, over all layers: by one update of a generated pass, and by the end of a
    first prompt turn. (0, 0) where heads decide for themselves.

    Of one set for a layer these are its float32 scores; of heads that compete, their order as int64, and each one's
    room.
    """
    step = prompt = 0
    for layer in plan.layers:
        for pool in layer.pools:
            waiting = -(-plan.prompt[1] // pool.page) if pool.hears_prompts else 0
            cells = plan.batch * plan.geometry.kv_heads
            if pool.evicts and pool.scope == "layer":
                step += 4 * cells * pool.units if pool.cadence else 0
                prompt += 4 * cells * waiting
            elif pool.evicts and pool.scope == "across-heads":
                prompt += 8 * cells * (waiting + 1)
    return step, prompt
