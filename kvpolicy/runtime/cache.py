"""The cache module: a transformers ``Cache`` whose layers keep what a policy keeps.

The host opens every pass of the whole model with ``begin``. It advances the clocks and says what kind of pass this is;
the layers then do their five steps without asking the host anything. All state lives here; nothing on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpolicy.attention import Rotation
from kvpolicy.attention.backends import choose_backend
from kvpolicy.errors import CacheError
from kvpolicy.plan import Plan, PoolPlan, check_supported, make_plan, on_rank
from kvpolicy.runtime.chunks import cut
from kvpolicy.runtime.clocks import TORCH_DTYPES, Clocks
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.local_layer import LocalLayer
from kvpolicy.runtime.moment import PLAIN, PROMPT, UPDATE, Moment
from kvpolicy.runtime.protocol import new_columns
from kvpolicy.runtime.ranks import ALONE, Ranks, merged
from kvpolicy.runtime.saved import copied, save_cache
from kvpolicy.runtime.split import SplitLayer
from kvpolicy.runtime.state_layer import StateLayer
from kvpolicy.runtime.tail import Tail


class PolicyCache(Cache):
    """Fixed slots for every layer, filled and emptied as the plan's policy says.

    ``layers`` are the model's, in its order; ``governed`` those that the policy governs, in its own.

    Args:
        plan: what ``make_plan`` made of a policy, a model's geometry and the lengths to come.
        device: where the slots lie. They have the plan's dtype.
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
        device: torch.device | str = "cpu",
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
        self.device = torch.device(device)
        self.clocks = Clocks(plan, self.device)
        self.moment = Moment(rotation=self.rotation)
        self.backend, self.backend_reason = choose_backend(backend, self.device, self.own.geometry)
        self.governed: list[Any] = [
            (SplitLayer if layer.groups else PolicyLayer)(
                layer, self.own.geometry, self.clocks, self.moment, self.device, self.backend, rotation, ranks
            )
            for layer in self.own.layers
        ]
        self.local = [LocalLayer(layer, self.clocks, self.moment, self.device) for layer in self.own.local]
        self.states = [StateLayer() for _ in plan.geometry.states]
        super().__init__(layers=_in_order(plan, self.governed, self.local, self.states))
        self.tail = Tail()
        self._note_cadences()
        self._forget()

    def _note_cadences(self) -> None:
        """The distinct cadences, each with the stream whose pages must open before an update has work to do."""

        def waits(pool: PoolPlan) -> bool:
            learns = any(leaf.remembers and isinstance(leaf.queries, int) for leaf in pool.scorer.leaves())
            steady = pool.cadence == 1 and pool.victims > 0 and pool.window is None
            return pool.page > 1 and steady and not learns  # a window of queries is remembered at updates alone

        self._cadences = {
            (pool.cadence, pool.stream if waits(pool) else None)
            for layer in self.plan.layers
            for pool in layer.every_pool
            if pool.evicts and pool.cadence > 0
        }
        every = any(cadence == 1 and stream is None for cadence, stream in self._cadences)
        self.moment.plan, self._asked = self.plan, self.plan.traits
        self.moment.kinds = (UPDATE,) if every else (PLAIN, UPDATE) if self._cadences else (PLAIN,)

    def _forget(self) -> None:
        self.turn_columns = 0
        self.expected: int | None = None
        self._told: dict[str, Tensor] = {}
        self.passes = {PROMPT: 0, PLAIN: 0, UPDATE: 0}
        self.tail.forget()
        self.finish()

    # Opening a pass -----------------------------------------------------------------------------------------------

    def begin(
        self,
        columns: int,
        valid: Tensor | None = None,
        *,
        kind: str | None = None,
        more: bool | None = None,
        special: Tensor | None = None,
        modality: Tensor | None = None,
    ) -> str:
        """Open the next pass of the model and say what it is: "prompt", "plain" or "update".

        Args:
            columns: N, new tokens per row, padding included.
            valid: [B, N] bool, False where a column is padding; None where nothing is.
            kind: "prompt" or "generated"; by default one column on a non-empty cache is generated, all else a prompt.
            more: whether further chunks of this prompt turn follow; by default only where ``expect_prompt`` says so.
            special: [B, N] bool, which tokens of a prompt pass are special; None where none is.
            modality: [B, N], of what kind the tokens of a prompt pass are: 1 (or True) for an image's, 0 for text, and
                other numbers as models have them (2 for a video's); None where all are text.

        Raises:
            CacheError: the plan has no room for these tokens, or a generated pass would skip a row.
        """
        kind = kind or self.kind_of(columns)
        told, self._told = {**self._told, **_known(special=special, modality=modality)}, {}
        if kind == "generated":
            opened = self.open_step(columns, valid)
            self.clocks.advance()
            return opened
        if kind != "prompt":
            raise CacheError(f"a pass is of kind prompt or generated, not {kind!r}")
        self._begin_prompt(columns, valid, more, told)
        self.clocks.columns += columns
        self.passes[PROMPT] += 1
        return PROMPT

    def kind_of(self, columns: int) -> str:
        """What the next pass is, "prompt" or "generated", where nobody says so."""
        in_turn = self.turn_columns > 0 or self.expected is not None
        return "generated" if columns == 1 and self.clocks.columns > 0 and not in_turn else "prompt"

    def coming(self, columns: int, valid: Tensor | None = None) -> Tensor:
        """Where the columns of the next pass will stand in their rows' text [B, N]; padding goes with what follows it.

        ``valid`` as ``begin`` takes it.
        """
        brought = torch.ones(self.plan.batch, columns, device=self.device) if valid is None else valid.to(self.device)
        before = self.clocks.prompt_len + self.clocks.t
        return before[:, None] + (brought.bool().long().cumsum(1) - 1).clamp(min=0)

    def tell(self, *, special: Tensor | None = None, modality: Tensor | None = None) -> None:
        """Say of what kind the tokens of the next pass are, as ``begin`` takes it, before the pass is opened.

        A model with a policy reads this off its own inputs; what is told goes before that.
        """
        self._told |= _known(special=special, modality=modality)

    @property
    def wants(self) -> frozenset[str]:
        """Which of "special" and "image" the policy asks of the next prompt pass's tokens, and nobody has told yet."""
        told = {"special": "special", "image": "modality"}
        return frozenset(name for name in self._asked if told[name] not in self._told)

    def open_step(self, columns: int = 1, valid: Tensor | None = None) -> str:
        """The host's half of ``begin`` for a generated pass: "plain" or "update"; asks and tells the device nothing.

        Whoever calls it owes the device its half, ``clocks.advance()``, and then the pass and ``finish()``: a recorded
        step replays them.

        Raises:
            CacheError: as ``begin``.
        """
        if columns != 1:
            raise CacheError(f"a generated pass takes one token a row, got {columns} columns; feed them one by one")
        if self.turn_columns:
            raise CacheError("the prompt turn is not finished: its last chunk must come with more=False")
        if valid is not None and not bool(valid.all()):
            raise CacheError("a generated pass cannot skip a row; give a finished row its pad token with mask 1")
        if self.clocks.host_t >= self.plan.max_new_tokens:
            raise CacheError(
                f"this cache was planned for {self.plan.max_new_tokens} generated tokens and has them all; plan for "
                "more (max_new_tokens) or call cache.extend(max_new_tokens=…) between passes"
            )
        self.clocks.count()
        self.moment.columns = 1
        self.moment.kind = kind = UPDATE if self._update_due() else PLAIN
        self.passes[kind] += 1
        return kind

    def _begin_prompt(self, columns: int, valid: Tensor | None, more: bool | None, told: Mapping[str, Tensor]) -> None:
        first, empty = self.turn_columns == 0, self.clocks.columns == self.turn_columns
        if valid is None:
            valid = torch.ones(self.plan.batch, columns, dtype=torch.bool, device=self.device)
            padded = False
        else:
            valid = valid.to(self.device, torch.bool)
            padded = not bool(valid.all())
        if valid.shape != (self.plan.batch, columns):
            raise CacheError(
                f"this cache has {self.plan.batch} rows; a pass of shape {tuple(valid.shape)} does not fit"
            )
        if more is None:
            more = self.expected is not None and self.turn_columns + columns < self.expected
        traits = self._traits(valid, told)
        self._check_prompt((self.clocks.prompt_len + valid.sum(1)).tolist(), more)
        if first:
            self.clocks.open_turn()
        self.turn_columns += columns
        moment = self.moment
        moment.kind, moment.columns, moment.more = PROMPT, columns, more
        self.tail.open(valid if padded else None, more)
        moment.first, moment.empty = first, empty and first
        moment.whole = first and empty and not padded
        moment.traits, moment.chunks = traits, ()
        if self.plan.prompt_chunk is None:
            moment.position, moment.places = self.clocks.prompt(valid, traits)
        else:
            moment.position, moment.places = torch.where(valid, self.coming(columns, valid), -1), ()
            moment.chunks = cut(self.clocks, valid, traits, self.plan.prompt_chunk)
        if not more:
            self.clocks.close_turn()
            self.turn_columns, self.expected = 0, None

    def _traits(self, valid: Tensor, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the policy asks of a prompt pass's tokens, by the name of the trait [B, N] bool."""
        for name, flags in told.items():
            if flags.shape != valid.shape:
                raise CacheError(
                    f"{name} says what each token of the pass is, so it has the shape {tuple(valid.shape)}, not "
                    f"{tuple(flags.shape)}"
                )
        known = {name: flags.to(self.device) for name, flags in told.items()}
        traits = {"special": known.get("special", torch.zeros_like(valid)).bool()}
        traits["image"] = known.get("modality", torch.zeros_like(valid)) == 1
        return {name: traits[name] for name in sorted(self._asked)}

    def _check_prompt(self, lengths: list[int], more: bool) -> None:
        """Refuse prompts, by row, that the plan made no room for: longer ones, and shorter ones where that makes room
        for others (RaaS gives what the prompt leaves to the generated tokens)."""
        low, high = self.plan.prompt
        if max(lengths) > high:
            raise CacheError(
                f"this cache was planned for at most {high} prompt tokens a row, and a row would have {max(lengths)}; "
                "plan for more, or call cache.extend(prompt=…) before the turn"
            )
        if not more and min(lengths) < low and self.plan.reads_lengths:
            raise CacheError(
                f"this cache was planned for at least {low} prompt tokens a row, and row {lengths.index(min(lengths))} "
                f"has {min(lengths)}, with which the budgets of {self.plan.policy.name} may be larger; plan for "
                f"prompt=({min(lengths)}, {high})"
            )

    def _update_due(self) -> bool:
        """Whether any pool of any layer may have to drop something at this generated pass: the host knows its clocks.

        A paged pool that is steady, has no window and is updated every step exceeds its budget only when a page opens.
        """
        return any(
            self.clocks.host_t % cadence == 0 and (stream is None or self.clocks.streams[stream].opened_now)
            for cadence, stream in self._cadences
        )

    def finish(self) -> None:
        """Close the pass: the last layer has run. A pass that nobody opened then fails instead of running stale."""
        self.moment.kind = None
        self.opened_ahead = False  # whether a stepper opened the pass: the model's hook then must not

    def expect_prompt(self, columns: int) -> None:
        """Announce the columns of the coming prompt turn, so that its chunks know which of them is the last."""
        self.expected = columns

    # What transformers asks ----------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included; never tokens kept."""
        return self.clocks.columns

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """A policy's layers make their own mask by position; this only tells the mask function how many are new."""
        return new_columns(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise CacheError("this cache belongs to a model with a policy applied; kvpolicy.apply(model, policy) first")

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError(
            "a policy's cache cannot be cropped or rolled back: what was evicted is gone; assisted decoding and prompt "
            "lookup need a full cache"
        )

    def reset(self) -> None:
        """Forget everything; the tensors and their addresses stay."""
        self.clocks.reset()
        for layer in self.layers:
            layer.reset()
        self._forget()

    def parts(self) -> Iterator[PolicyLayer]:
        """Every group of heads with equal pools, of every layer: most layers are one."""
        for layer in self.governed:
            yield from layer.parts

    def _tensors(self) -> list[Tensor]:
        slots = [tensor for part in self.parts() for tensor in part.state.all_tensors()]
        return self.clocks.tensors() + slots + [tensor for layer in self.local for tensor in layer.tensors.values()]

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
        """Bytes that the cache's tensors hold on this rank: what the plan announced. What layers in ``states`` hold, of
        a size that no text changes, is the model's own matter."""
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
        self.clocks.extend(plan)
        own = on_rank(plan, self.ranks.rank, self.ranks.size)
        for layer, sizes in zip((*self.governed, *self.local), (*own.layers, *own.local), strict=True):
            layer.replan(sizes)
        self.plan, self.own = plan, own
        self._note_cadences()


def _in_order(plan: Plan, governed: Sequence[Any], local: Sequence[Any], states: Sequence[Any]) -> list[Any]:
    """The layers as the model numbers them."""
    numbers = (*plan.geometry.governed, *(layer.layer.index for layer in plan.local), *plan.geometry.states)
    by_number = dict(zip(numbers, (*governed, *local, *states), strict=True))
    return [by_number[number] for number in sorted(by_number)]


def _known(**flags: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in flags.items() if value is not None}


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
