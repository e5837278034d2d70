"""A generated pass of one layer in two kernel launches, where the layer's policy allows it.

``Fusion.of`` reads a plan and says either what the kernels must know of it, or in one clause why the layer does not
fit. A layer that does not fit still attends with the kernels; its policy then runs as torch code (``token_pass.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvpolicy.attention.kernels.form import Arrival, Form, Ranked, Work, register
from kvpolicy.attention.kernels.ops import decode_step
from kvpolicy.language import Quantity
from kvpolicy.plan import LayerPlan, ModelGeometry, PoolPlan, ScorerPlan
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.state import LayerState

SIGNALS = ("attention", "attention-logit", "page-bound", "recency", "random")
MEMORIES = ("none", "sum", "decay", "max-decay", "last-hit")
HEADS = ("mean", "max", "sum")
MOST_UNITS = 8192  # a row of them lies in the registers of one program
MOST_TOKENS = 32768

Role = tuple[str, Tensor, bool]  # what a tensor is to the kernels, the tensor, whether a step writes it


@dataclass(frozen=True)
class Fusion:
    """What the fused step is for one layer shape: the ``plain`` and the ``update`` step."""

    plan: LayerPlan
    geometry: ModelGeometry
    arrival: PoolPlan
    working: PoolPlan | None

    launches = Form.launches

    @classmethod
    def of(cls, plan: LayerPlan, geometry: ModelGeometry) -> Fusion | str:
        """The fusion of a layer, or why it has none."""
        arrival = next((pool for pool in plan.pools if "generated" in pool.admits), None)
        working = [pool for pool in plan.pools if pool.evicts and pool.cadence > 0]
        if arrival is None:
            return "no pool admits generated tokens"
        if len(working) > 1:
            return f"pools {' and '.join(pool.name for pool in working)} both drop tokens while generating"
        reasons = _reasons(plan, arrival, working[0] if working else None)
        return next(reasons, None) or cls(plan, geometry, arrival, working[0] if working else None)

    def bind(self, state: LayerState, clocks: Clocks) -> FusedStep:
        """The step over the tensors of one layer."""
        return FusedStep(self, state, clocks)

    def work(self, update: bool) -> Work | None:
        """What the policy does in a step; None where that is nothing at all."""
        pool = self.working
        if pool is None:
            return None
        leaf = pool.scorer
        if not (update or leaf.remembers):
            return None
        assert pool.budget is not None
        ranked = _ranked(self.plan, pool)
        hit = leaf.hit and (leaf.hit[0], leaf.hit[1].tree if isinstance(leaf.hit[1], Quantity) else float(leaf.hit[1]))
        return Work(
            ranked=tuple(Ranked(other.offset, other.page, other.units, other is self.arrival) for other in ranked),
            own=ranked.index(pool),
            signal=_signal(pool, ranked),
            heads=leaf.heads,
            hit=hit,
            memory=(leaf.memory[0], float(leaf.memory[1] or 0)),
            weight=float(leaf.weight),
            updates=update,
            budget=pool.budget.tree,
            window=pool.window.tree if pool.window is not None else None,
            first=pool.first.tree if pool.first is not None else None,
            cadence=pool.cadence,
            most=min(pool.victims or pool.units, pool.units),
            reads=tuple((name, name.startswith("size(")) for name in _names_read(pool)),
        )

    def form(self, update: bool, roles: list[Role]) -> Form:
        """The form of a step whose tensors play these roles."""
        leaf = next(self.arrival.scorer.leaves()) if self.arrival.evicts else ScorerPlan()
        starts = {"none": "", "last-hit": "clock"}.get(leaf.memory[0], "zero")
        seed = int(dict(leaf.args).get("seed", 0)) if leaf.signal == "random" else None
        written, read = _grouped(roles)
        return Form(
            group=self.geometry.group,
            kv_heads=self.geometry.kv_heads,
            head_dim=self.geometry.head_dim,
            slots=self.plan.slots,
            arrival=Arrival(self.arrival.offset, self.arrival.page, self.arrival.units, starts, seed),
            work=self.work(update),
            state=tuple(written),
            given=tuple(read),
        )


class FusedStep:
    """Both kinds of step of one layer, bound to its tensors."""

    def __init__(self, fusion: Fusion, state: LayerState, clocks: Clocks) -> None:
        self.launches = fusion.launches
        self.names: dict[bool, str] = {}
        self.forms: dict[bool, Form] = {}
        self.state: dict[bool, list[Tensor]] = {}
        self.given: dict[bool, list[Tensor]] = {}
        for update in (False, True):
            roles = [*_arrival_roles(fusion, state, clocks), *_work_roles(fusion, update, state, clocks)]
            written, read = _grouped(roles)
            self.forms[update] = fusion.form(update, roles)
            self.names[update] = register(self.forms[update])
            self.state[update], self.given[update] = list(written.values()), list(read.values())

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, update: bool) -> Tensor:
        """Query [B, Q, 1, D], key and value [B, K, 1, D] -> attention [B, 1, Q, D]; the cache has moved on."""
        out: Tensor = decode_step(
            query, key, value, self.state[update], self.given[update], scaling, self.names[update]
        )
        return out


def _reasons(plan: LayerPlan, arrival: PoolPlan, working: PoolPlan | None) -> Iterator[str]:
    """Everything that the kernels were not written for, in one clause each."""
    if plan.compact:
        yield "positions are compact, so all keys turn at every pass"
    for pool in plan.shared:
        yield f"KV heads share the slots of pool {pool.name}"
    for pool in plan.pools:
        if pool.read is not None or pool.store is not None or pool.to is not None:
            yield f"pool {pool.name} selects, quantises or feeds another"
        if pool.size_read and (pool is working or (pool is arrival and not pool.evicts)):
            yield f"size({pool.name}) changes while generating"
    for pool in {arrival.name: arrival, **({working.name: working} if working else {})}.values():
        if plan.members not in ((), tuple(range(len(plan.members)))) and _draws(pool):
            yield f"pool {pool.name} draws by the numbers of its heads in the model, which the kernels count from 0"
        if pool.evicts:
            yield from (f"pool {pool.name}: {reason}" for reason in _scorer_reasons(pool))
    if working is not None:
        yield from (f"pool {working.name}: {reason}" for reason in _work_reasons(plan, working))


def _draws(pool: PoolPlan) -> bool:
    return any(leaf.signal == "random" for leaf in pool.scorer.leaves())


def _scorer_reasons(pool: PoolPlan) -> Iterator[str]:
    leaf = pool.scorer
    if leaf.op != "leaf":
        yield f"a {leaf.op} of scorers"
    elif leaf.memory[0] not in MEMORIES:
        yield f"memory {leaf.memory[0]}"
    if pool.pin_survivors:
        yield "survivors are pinned"


def _work_reasons(plan: LayerPlan, pool: PoolPlan) -> Iterator[str]:
    leaf, ranked = pool.scorer, _ranked(plan, pool)
    if pool.scope != "kv-head":
        yield f"evict scope {pool.scope}"
    if pool.pin_special:
        yield "special tokens are pinned"
    if leaf.signal not in SIGNALS:
        yield f"signal {leaf.signal}"
    if leaf.over != "cache" and (leaf.over != "pool" or leaf.signal == "attention"):
        yield f"{leaf.signal} over {leaf.over}"
    if leaf.heads not in HEADS:
        yield f"heads {leaf.heads}"
    if leaf.smooth is not None or leaf.norm is not None:
        yield "smooth and norm"
    if leaf.signal == "random" and len(ranked) > 1:
        yield "numbers drawn for other pools"
    if leaf.signal == "page-bound" and len({other.page == 1 for other in ranked}) > 1:
        yield "bounds of pages beside single tokens"
    units = sum(other.units for other in ranked)
    if units > MOST_UNITS or units * max(other.page for other in ranked) > MOST_TOKENS:
        yield f"{units} units are more than one program holds"


def _ranked(plan: LayerPlan, pool: PoolPlan) -> list[PoolPlan]:
    """The pools whose units compete: all of the layer where hits are ranked over the cache."""
    leaf = pool.scorer
    if leaf.hit is not None and leaf.hit[0] == "top" and leaf.over == "cache":
        return sorted(plan.pools, key=lambda other: other.offset)
    return [pool]


def _signal(pool: PoolPlan, ranked: list[PoolPlan]) -> str:
    """A page of one token is bounded by its own logit."""
    signal = pool.scorer.signal
    return "attention-logit" if signal == "page-bound" and all(other.page == 1 for other in ranked) else signal


def _names_read(pool: PoolPlan) -> list[str]:
    """What the quantities of a pool read; the context is the prompt and t."""
    names = {name for _, quantity in pool.quantities() for name in quantity.names}
    if "context" in names:
        names = (names - {"context"}) | {"prompt_len", "t"}
    return sorted(names)


def _arrival_roles(fusion: Fusion, state: LayerState, clocks: Clocks) -> Iterator[Role]:
    """What the newest token's entry writes and reads."""
    pool, tensors = fusion.arrival, state.tensors
    clock = clocks.streams[pool.stream]
    yield from (("keys", state.keys, True), ("values", state.values, True), ("position", state.position, True))
    yield from (("ring", tensors[f"{pool.name}.ring"], False), ("opened", clock.opened, False))
    yield from (("now", clocks.position, False), ("t", clocks.t, False))
    if pool.page > 1:
        yield "fill", clock.fill, False
    if pool.needs_ordinals:
        yield from (("ordinal", tensors[f"{pool.name}.ordinal"], True), ("ordinal_now", clock.ordinal, False))
    kept = {"high": "high", "low": "low", "entry_memory": "memory.0", "drawn": "drawn.0"}
    for role, name in kept.items():
        tensor = tensors.get(f"{pool.name}.{name}")
        if tensor is not None:
            yield role, tensor, True
    if f"{pool.name}.drawn.0" in tensors:
        yield "layer", state.layer, False


def _work_roles(fusion: Fusion, update: bool, state: LayerState, clocks: Clocks) -> Iterator[Role]:
    """What the policy writes and reads."""
    pool, work = fusion.working, fusion.work(update)
    if pool is None or work is None:
        return
    tensors, clock = state.tensors, clocks.streams[pool.stream]
    yield from (("work_ring", tensors[f"{pool.name}.ring"], update), ("work_opened", clock.opened, False))
    if work.signal == "page-bound":
        for number, other in enumerate(_ranked(fusion.plan, pool)):
            yield f"high.{number}", tensors[f"{other.name}.high"], False
            yield f"low.{number}", tensors[f"{other.name}.low"], False
    if work.memory[0] != "none":
        yield "memory", tensors[f"{pool.name}.memory.0"], True
    if work.signal == "random":
        yield "work_drawn", tensors[f"{pool.name}.drawn.0"], False
    if update:
        yield from (("tail", tensors[f"{pool.name}.tail"], True), ("peak", tensors[f"{pool.name}.peak"], True))
        if pool.needs_ordinals:
            yield from (("work_ordinal", tensors[f"{pool.name}.ordinal"], False), ("seen", clock.seen, False))
    for name, _ in work.reads:
        yield name, _reading(name, fusion.plan, state, clocks), False


def _reading(name: str, plan: LayerPlan, state: LayerState, clocks: Clocks) -> Tensor:
    """Where a name of an expression lies."""
    function, bracket, pool_name = name.partition("(")
    if not bracket:
        clock: Tensor = getattr(clocks, name)
        return clock
    if function == "size":
        return state.tensors[f"{pool_name[:-1]}.size"]
    stream = next(pool.stream for pool in plan.pools if pool.name == pool_name[:-1])
    return clocks.streams[stream].seen


def _grouped(roles: list[Role]) -> tuple[dict[tuple[str, ...], Tensor], dict[tuple[str, ...], Tensor]]:
    """Each tensor once, under all the roles it plays: those that are written, and those that are only read."""
    tensors: dict[int, tuple[list[str], Tensor, bool]] = {}
    for role, tensor, written in roles:
        names, _, before = tensors.get(id(tensor), ([], tensor, False))
        if role not in names:
            names.append(role)
        tensors[id(tensor)] = (names, tensor, before or written)
    sides: Any = ({}, {})
    for names, tensor, written in tensors.values():
        sides[0 if written else 1][tuple(names)] = tensor
    return sides[0], sides[1]
