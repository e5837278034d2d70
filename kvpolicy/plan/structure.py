"""The plan itself: frozen numbers, one step before tensors.

Shapes are named by one legend, here and in the runtime: B rows, Q query heads, K KV heads, G = Q / K, S slots,
U units (pages; tokens where page is 1), N new tokens, D head size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from kvpolicy.language import Policy, Quantity
from kvpolicy.plan.geometry import DTYPE_BYTES, ModelGeometry
from kvpolicy.plan.layer_kinds import LocalLayer


@dataclass(frozen=True)
class ScorerPlan:
    """A scorer: a leaf reads one signal through its stages; ``sum`` and ``product`` combine their ``parts``."""

    op: str = "leaf"
    parts: tuple[ScorerPlan, ...] = ()
    weight: Fraction = Fraction(1)
    signal: str = "recency"
    args: tuple[tuple[str, Any], ...] = ()
    queries: str | int = "current"
    over: str = "cache"
    heads: str = "mean"
    smooth: tuple[str, int] | None = None
    norm: str | None = None
    hit: tuple[str, Quantity] | tuple[str, Fraction] | None = None
    memory: tuple[str, Fraction | None] = ("none", None)

    def leaves(self) -> Iterator[ScorerPlan]:
        """Every leaf, depth first: their order names the memory buffers."""
        if self.op == "leaf":
            yield self
        for part in self.parts:
            yield from part.leaves()

    @property
    def remembers(self) -> bool:
        """Whether a leaf folds each observed pass into a memory."""
        return self.memory[0] != "none"


@dataclass(frozen=True)
class ReadPlan:
    """Selection: the ``top`` best units by ``scorer`` are read in generated passes."""

    top: Quantity
    scorer: ScorerPlan


@dataclass(frozen=True)
class StorePlan:
    """Quantised storage: ``bits`` per number in groups of ``group``, along channels or tokens."""

    bits: int
    group: int
    keys: str
    values: str


TRAITS = frozenset({"special", "image"})
"""What a prompt token may be beside being one, each by its own name: the caller says so."""


@dataclass(frozen=True)
class Stream:
    """One order of arrival: the pools of all layers that admit the same tokens in pages of the same size.

    ``above`` are the traits with which a prompt token went to a pool further up.
    """

    admits: frozenset[str]
    page: int
    above: frozenset[str] = frozenset()

    @property
    def hears_prompts(self) -> bool:
        """Whether a prompt pass can bring it anything."""
        return bool(self.admits & {"prompt", *TRAITS})

    @property
    def traits(self) -> frozenset[str]:
        """The traits by which prompt tokens are told apart here; none where it takes them all, or none of them."""
        return (self.admits & TRAITS) | self.above


@dataclass(frozen=True)
class Buffer:
    """One tensor that the runtime allocates for a layer, or for the whole cache."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def holds_tokens(self) -> bool:
        """Whether it holds keys or values, and no notes about them."""
        return not {"keys", "values"}.isdisjoint(re.split(r"[./]", self.name))


@dataclass(frozen=True)
class PoolPlan:
    """One pool of one layer in numbers. ``capacity`` and ``bound`` are tokens, whole pages.

    ``fed``: another pool moves its units here. One update of a generated pass drops at most ``victims`` units (0: any
    number); one generated pass reads at most ``read_units`` of them beside the newest. Slots of a ``shared`` pool are
    all KV heads' together: a row has ``capacity`` of them, and any may hold any head's token.
    """

    name: str
    admits: frozenset[str]
    page: int
    budget: Quantity | None
    window: Quantity | None
    first: Quantity | None
    pin_special: bool
    pin_survivors: bool
    scorer: ScorerPlan
    scope: str
    floor: Fraction
    to: str | None
    cadence: int
    read: ReadPlan | None
    store: StorePlan | None
    stream: int = 0
    capacity: int = 0
    bound: int = 0
    offset: int = 0
    shared: bool = False
    victims: int = 0
    read_units: int = 0
    size_read: bool = False
    above: frozenset[str] = frozenset()
    fed: bool = False

    @property
    def order_of_arrival(self) -> Stream:
        """The stream that the pool's tokens come in."""
        return Stream(self.admits, self.page, self.above)

    @property
    def hears_prompts(self) -> bool:
        """Whether a prompt pass can bring it tokens."""
        return self.order_of_arrival.hears_prompts

    @property
    def units(self) -> int:
        """U: page slots (token slots where page is 1)."""
        return self.capacity // self.page

    @property
    def evicts(self) -> bool:
        """Whether anything can ever leave this pool."""
        return self.budget is not None

    @property
    def needs_ordinals(self) -> bool:
        """Whether protection asks where in the order of arrival a token stands; in a ``fed`` pool positions tell."""
        return self.evicts and not self.fed and (self.window is not None or self.first is not None)

    @property
    def stages(self) -> bool:
        """Whether its open page waits at the model's precision beside what is stored in few bits."""
        return self.store is not None and not self.fed

    def quantities(self) -> Iterator[tuple[tuple[str, ...], Quantity]]:
        """Every quantity that may still vary by row and step, and under which keys of the pool it stands."""
        yield from (
            ((key,), quantity)
            for key, quantity in (("budget", self.budget), ("window", self.window), ("pinned", self.first))
            if quantity is not None
        )
        for key, scorer in (("scorer",), self.scorer), (("read", "scorer"), self.read and self.read.scorer):
            for leaf in scorer.leaves() if scorer else ():
                if leaf.hit is not None and isinstance(leaf.hit[1], Quantity):
                    yield key, leaf.hit[1]
        if self.read:
            yield ("read", "top"), self.read.top


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its pools in reading order, and in which ``order`` they are updated.

    Where an override names heads, ``heads`` holds the pools per KV head, and ``groups`` a plan for the ``members`` that
    have equal pools, with slots of their own; ``pools`` are then those of the group that keeps most. ``buffers`` is
    everything the runtime allocates for the layer, so the bytes that are printed are the bytes that are allocated.
    ``compact``: in each pass keys and queries stand at their ranks.
    """

    index: int
    dense: bool
    pools: tuple[PoolPlan, ...]
    order: tuple[int, ...]
    heads: tuple[tuple[PoolPlan, ...], ...] | None = None
    buffers: tuple[Buffer, ...] = ()
    groups: tuple[LayerPlan, ...] = ()
    members: tuple[int, ...] = ()
    compact: bool = False

    @property
    def every_pool(self) -> tuple[PoolPlan, ...]:
        """The pools of all heads."""
        return tuple(pool for group in self.groups for pool in group.pools) or self.pools

    @property
    def shape(self) -> LayerPlan:
        """What layers that run alike have in common: all but the index, and which heads form a group."""
        groups = tuple(replace(group, index=0, members=tuple(range(len(group.members)))) for group in self.groups)
        return replace(self, index=0, groups=groups, heads=None, buffers=() if groups else self.buffers)

    @property
    def window_queries(self) -> int:
        """w: the most newest queries that a scorer of ``queries: {last: w}`` averages over; 0 where there is none."""
        leaves = (leaf for pool in self.pools if pool.evicts for leaf in pool.scorer.leaves())
        return max((leaf.queries for leaf in leaves if isinstance(leaf.queries, int)), default=0)

    @property
    def slots(self) -> int:
        """S: token slots that each KV head of a row has for itself."""
        return sum(pool.capacity for pool in self.pools if not pool.shared)

    @property
    def shared(self) -> tuple[PoolPlan, ...]:
        """Pools whose slots the KV heads of a row share."""
        return tuple(pool for pool in self.pools if pool.shared)

    @property
    def whole_slots(self) -> int:
        """Those among them that hold the model's own numbers; they come first."""
        return sum(pool.capacity for pool in self.pools if pool.store is None and not pool.shared)

    @property
    def bound(self) -> int:
        """The most tokens resident after any update, per row and KV head."""
        return sum(pool.bound for pool in self.pools)

    @property
    def bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers)


@dataclass(frozen=True)
class LocalPlan:
    """The slots of a layer that no policy touches: a ring of as many as a query sees, or as the text has tokens."""

    layer: LocalLayer
    slots: int
    buffers: tuple[Buffer, ...]

    @property
    def shape(self) -> LocalPlan:
        """What layers that run alike have in common."""
        return replace(self, layer=replace(self.layer, index=0))

    @property
    def bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.buffers)


@dataclass(frozen=True)
class Plan:
    """Policy + geometry + lengths, as numbers. ``prompt`` is the (fewest, most) prompt tokens a row may bring.

    ``layers`` are those that the policy governs, in its own numbering; ``local`` the model's others.

    ``turns`` is how many prompt turns the cache is planned for (each may leave a page half full). ``prompt_chunk``
    tokens of a row are read at once, with an update after them; None where the whole prompt is.
    """

    policy: Policy
    geometry: ModelGeometry
    batch: int
    prompt: tuple[int, int]
    max_new_tokens: int
    turns: int
    layers: tuple[LayerPlan, ...]
    streams: tuple[Stream, ...]
    clocks: tuple[Buffer, ...]
    prompt_chunk: int | None = None
    local: tuple[LocalPlan, ...] = ()

    @property
    def bytes(self) -> int:
        """All the memory the cache allocates, in bytes, its bookkeeping included."""
        slots = sum(layer.bytes for layer in self.layers) + self.local_bytes
        return slots + sum(buffer.bytes for buffer in self.clocks)

    @property
    def local_bytes(self) -> int:
        """What the layers take that no policy touches."""
        return sum(layer.bytes for layer in self.local)

    @property
    def dense_bytes(self) -> int:
        """Keys and values of the full cache at the same lengths, in bytes; local layers hold no more than they see."""
        shape = self.geometry
        length = self.prompt[1] + self.max_new_tokens
        tokens = shape.layers * length + sum(min(local.span, length) for local in shape.local)
        return 2 * self.batch * tokens * shape.kv_heads * shape.head_dim * DTYPE_BYTES[shape.dtype]

    @property
    def resident_bound(self) -> int:
        """The most tokens any layer keeps per row and KV head after an update."""
        return max(layer.bound for layer in self.layers)

    @property
    def prompt_peak(self) -> int:
        """Tokens a layer has room for while it reads the longest prompt, per row and KV head: its slots, and beside
        them the prompt, or a chunk of it together with what the slots hold."""
        slots = max(layer.slots + sum(pool.bound for pool in layer.shared) for layer in self.layers)
        longest = self.prompt[1]
        if self.prompt_chunk is None or longest <= self.prompt_chunk:
            return slots + longest
        return 2 * slots + self.prompt_chunk

    def even(self, layer: LayerPlan) -> LayerPlan:
        """A layer as if heads that share slots had even parts of them, whole pages: what it comes to by head, told or
        counted; the runtime allocates something else."""
        pools = []
        for pool in layer.pools:
            part = -(-pool.units // self.geometry.kv_heads) * pool.page
            even = replace(pool, shared=False, capacity=part, bound=min(pool.bound, part))
            pools.append(even if pool.shared else pool)
        return replace(layer, pools=tuple(pools))

    @property
    def traits(self) -> frozenset[str]:
        """Which of "special" and "image" the policy must be told of a prompt's tokens."""
        pools = (pool for layer in self.layers for pool in layer.every_pool)
        asked = frozenset().union(*(pool.order_of_arrival.traits for pool in pools))
        return asked | ({"special"} if pins_special(self.layers) else frozenset())

    @property
    def reads_lengths(self) -> bool:
        """Whether some number of the policy depends on how long the prompt is, or on what another pool holds."""
        names = {
            name
            for layer in self.layers
            for pool in layer.every_pool
            for _, quantity in pool.quantities()
            for name in quantity.names
        }
        return any(name in ("prompt_len", "context") or name.startswith("size(") for name in names)

    @property
    def never_fires(self) -> bool:
        """True where no pool can exceed its budget at these lengths."""
        heads = self.geometry.kv_heads
        return all(
            not pool.evicts
            or (pool.capacity if pool.shared else pool.bound)
            >= admitted(pool, self.prompt[1], self.max_new_tokens) * (heads if pool.shared else 1)
            for layer in self.layers
            for pool in layer.every_pool
        )


def pins_special(layers: Iterable[LayerPlan]) -> bool:
    """Whether some pool keeps special tokens where it would otherwise drop them."""
    return any(pool.pin_special and pool.evicts for layer in layers for pool in layer.every_pool)


def admitted(pool: PoolPlan, prompt: int, generated: int) -> int:
    """The most tokens that can ever arrive in a pool that is fed by the text (special tokens: at most the prompt)."""
    from_prompt = prompt if pool.admits - {"generated"} else 0
    return from_prompt + (generated if "generated" in pool.admits else 0)
