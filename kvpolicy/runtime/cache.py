"""The cache module: a transformers ``Cache`` whose layers keep what a policy keeps.

The host opens every pass of the whole model with ``begin``. It advances the clocks and says what kind of pass this is;
the layers then do their five steps without asking the host anything. All state lives here; nothing on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpolicy.attention import Rotation
from kvpolicy.attention.backends import choose_backend
from kvpolicy.errors import CacheError
from kvpolicy.plan import Plan, PoolPlan, check_supported, make_plan, on_rank
from kvpolicy.runtime.clocks import TORCH_DTYPES, Clocks
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.local_layer import LocalLayer
from kvpolicy.runtime.moment import Moment, Site
from kvpolicy.runtime.passes import Passes
from kvpolicy.runtime.ranks import ALONE, Ranks, merged
from kvpolicy.runtime.saved import copied, save_cache
from kvpolicy.runtime.split import SplitLayer
from kvpolicy.runtime.state_layer import StateLayer
from kvpolicy.runtime.tail import Tail


class PolicyCache(Passes, Cache):
    """Fixed slots for every layer, filled and emptied as the plan's policy says.

    ``layers`` are the model's, in its order; ``governed`` those that the policy governs, in its own.

    Args:
        plan: what ``make_plan`` made of a policy, a model's geometry and the lengths to come.
        device: where the slots lie; one for each of the model's layers where they lie apart. They have the plan's
            dtype.
        backend: who computes attention in generated passes: "torch", "triton", or "auto", which is triton on a GPU
            where it can run. ``cache.backend`` says what was chosen, ``cache.backend_reason`` why.
        rotation: the model's, for ``positions: compact``; ``Rotation.none()`` for numbers that carry none.
        ranks: the processes that share the model's KV heads. ``plan`` is the whole model's on each of them, and
            ``cache.own`` the part that lies here.

    Raises:
        UsageError: the policy says what this runtime cannot do yet, triton was asked for where it cannot run, or the
            heads cannot be shared out evenly.
    """

    loan: Any = None  # a shelf's, where the cache came from one (runtime/shelf.py)

    def __init__(
        self,
        plan: Plan,
        *,
        device: Device | Sequence[Device] = "cpu",
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        rotation: Rotation | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        check_supported(plan)
        compact = any(layer.compact for layer in plan.layers)
        self.rotation = rotation if compact else None
        if rotation is None and compact:
            raise CacheError(
                f"{plan.policy.name} has compact positions, for which keys are turned as the model rotates them: make "
                "its cache with kvpolicy.cache_for(model), or say how it does, PolicyCache(plan, rotation=…)"
            )
        stored = TORCH_DTYPES[plan.geometry.dtype]
        if dtype is not None and dtype != stored:
            raise CacheError(f"this plan stores {plan.geometry.dtype}, the model computes in {dtype}; plan for {dtype}")
        self.ranks = ranks
        self.plan, self.own = plan, on_rank(plan, ranks.rank, ranks.size)
        self.devices = _each(device, plan.geometry.depth)
        sites = {device: Site(device, Clocks(plan, device), Moment(rotation=self.rotation)) for device in self.devices}
        self.sites, at = list(sites.values()), [sites[device] for device in self.devices]
        self.backend, self.backend_reason = choose_backend(backend, self.device, self.own.geometry, len(sites))
        self.governed: list[Any] = [
            (SplitLayer if layer.groups else PolicyLayer)(layer, self.own.geometry, site, self.backend, rotation, ranks)
            for site, layer in zip(map(at.__getitem__, plan.geometry.governed), self.own.layers, strict=True)
        ]
        self.local = [LocalLayer(layer, at[layer.layer.index]) for layer in self.own.local]
        self.states = [StateLayer() for _ in plan.geometry.states]
        super().__init__(layers=_in_order(plan, self.governed, self.local, self.states))
        self.tail = Tail()
        self._note_cadences()
        self._forget()

    # What transformers asks ----------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included; never tokens kept."""
        return self.clocks.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """A policy's layers make their own mask by position; this only tells the mask function how many are new."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError("this cache belongs to a model with a policy applied; kvpolicy.apply(model, policy) first")

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError(
            "a policy's cache cannot be cropped or rolled back: what was evicted is gone; assisted decoding and prompt "
            "lookup need a full cache"
        )

    def reset(self) -> None:
        """Forget everything; the tensors and their addresses stay."""
        for site in self.sites:
            site.clocks.reset()
        for layer in self.layers:
            layer.reset()
        self._forget()

    def parts(self) -> Iterator[PolicyLayer]:
        """Every group of heads with equal pools, of every layer: most layers are one."""
        for layer in self.governed:
            yield from layer.parts

    def _tensors(self) -> list[Tensor]:
        slots = [tensor for part in self.parts() for tensor in part.state.all_tensors()]
        clocks = [tensor for site in self.sites for tensor in site.clocks.tensors()]
        return clocks + slots + [tensor for layer in self.local for tensor in layer.tensors.values()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order (a row may come twice), in place, as beam search asks."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.shape[0] != self.plan.batch:
            raise CacheError(f"this cache has {self.plan.batch} rows and cannot become one of {indices.shape[0]}")
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            raise CacheError(
                f"this cache has {self.plan.batch} rows and cannot grow in place; cache.copy(repeats={repeats}) has "
                f"{self.plan.batch * repeats}"
            )

    def _select(self, rows: Tensor) -> None:
        tensors = self._tensors()
        for tensor in tensors:
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
        for state in self.states:
            state.select(rows)

    # What people ask ------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes that the cache's tensors hold on this rank: what the plan announced, and its clocks once more for each
        further device. What layers in ``states`` hold, of a size that no text changes, is the model's own matter."""
        tensors = self._tensors()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def positions(self, layer_idx: int) -> Tensor:
        """Kept positions of a layer by slot: LongTensor [B, K, S], -1 where a slot is empty; of the KV heads here.

        Slots that KV heads share come last; there -1 also stands where a token is another head's.
        """
        return self.governed[layer_idx].positions()

    def stats(self, *, everywhere: bool = False) -> dict[str, Any]:
        """Counts over all layers, rows and KV heads; asks the device, so not for the middle of a loop.

        The KV heads are those of this rank; with ``everywhere``, which all ranks must then call, those of the model.

        ``pools`` maps a name to tokens ``resident`` (most in any row and head), ``peak`` (most held between updates),
        ``bound`` (the plan's), and in all ``seen``, ``evicted`` for good, and ``moved`` on to another pool.
        """
        pools: dict[str, dict[str, int]] = {}
        for part in self.parts():
            for pool in part.plan.pools:
                _count(part, pool, pools.setdefault(pool.name, dict.fromkeys(COUNTED, 0)))
        resident = max(int((part.state.all_positions >= 0).sum(-1).max()) for part in self.parts())
        stats = {
            "pools": pools,
            "evicted": sum(counts["evicted"] for counts in pools.values()),
            "resident": resident,
            "resident_peak": max(layer.peak() for layer in self.governed),
            "bound": self.plan.resident_bound,
            "bytes": self.bytes,
            "passes": dict(self.passes),
        }
        return merged(self.ranks.collect(stats)) if everywhere else stats

    def copy(self, repeats: int = 1) -> PolicyCache:
        """A cache of its own in the same state: fork a prompt that was read once, and let each copy go its own way.

        ``repeats`` gives every row so many times, one after the other, as ``num_return_sequences`` does.

        Raises:
            CacheError: a pass or a prompt turn is under way.
        """
        return copied(self, repeats)

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file; ``kvpolicy.load_cache(model, path)`` reads it.

        Raises:
            CacheError: a pass or a prompt turn is under way.
        """
        save_cache(self, path)

    def extend(self, *, prompt: int | tuple[int, int] | None = None, max_new_tokens: int | None = None) -> None:
        """Plan anew for longer lengths (totals over the cache's life) and move what is resident. Not inside a pass.

        Compiled steps belong to a plan, so the next step compiles again where sizes changed.
        """
        if self.turn_columns or self.moment.kind is not None:
            raise CacheError("a cache can be extended between turns only")
        wanted = self.plan.prompt if prompt is None else (prompt, prompt) if isinstance(prompt, int) else prompt
        plan = make_plan(
            self.plan.policy,
            self.plan.geometry,
            batch=self.plan.batch,
            prompt=(min(wanted[0], self.plan.prompt[0]), max(wanted[1], self.plan.prompt[1])),
            max_new_tokens=max(max_new_tokens or 0, self.plan.max_new_tokens),
            turns=self.plan.turns + 1,
        )
        for site in self.sites:
            site.clocks.extend(plan)
        own = on_rank(plan, self.ranks.rank, self.ranks.size)
        for layer, sizes in zip((*self.governed, *self.local), (*own.layers, *own.local), strict=True):
            layer.replan(sizes)
        self.plan, self.own = plan, own
        self._note_cadences()


def _each(device: Device | Sequence[Device], layers: int) -> tuple[torch.device, ...]:
    """The device of every layer of the model.

    Raises:
        CacheError: some are given, and not as many as there are layers.
    """
    given = [device] * layers if isinstance(device, str | torch.device) else device
    if len(given) != layers:
        raise CacheError(f"a model of {layers} layers has a device for each of them, or one for all, not {len(given)}")
    return tuple(map(torch.device, given))


def _in_order(plan: Plan, governed: Sequence[Any], local: Sequence[Any], states: Sequence[Any]) -> list[Any]:
    """The layers as the model numbers them."""
    numbers = (*plan.geometry.governed, *(layer.layer.index for layer in plan.local), *plan.geometry.states)
    by_number = dict(zip(numbers, (*governed, *local, *states), strict=True))
    return [by_number[number] for number in sorted(by_number)]


Device = torch.device | str

COUNTED = ("resident", "peak", "bound", "seen", "evicted", "moved")


def _count(layer: PolicyLayer, pool: PoolPlan, counts: dict[str, int]) -> None:
    state = layer.state
    resident = (state.pool_positions(pool) >= 0).flatten(2).sum(-1)
    seen = state.seen(pool).expand_as(resident)
    counts["resident"] = max(counts["resident"], int(resident.max()))
    counts["peak"] = max(counts["peak"], int(layer.pool_peak(pool).max()))
    counts["bound"] = max(counts["bound"], pool.bound)
    counts["seen"] += int(seen.sum())
    counts["moved" if pool.to is not None else "evicted"] += int((seen - resident).sum())
