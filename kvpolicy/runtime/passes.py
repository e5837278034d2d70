"""Opening and closing a pass: what the host does before the layers run, and what it counts.

The clocks and the open pass are told to every device that has layers, in tensors of its own (a ``Site``), each reckoned
there from the same inputs: so no step moves anything between devices but what the model itself does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.plan import Plan, PoolPlan
from kvpolicy.runtime.chunks import cut
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.moment import GIVEN, PLAIN, PROMPT, UPDATE, Moment, Site
from kvpolicy.runtime.tail import Tail


class Passes:
    """The passes of a cache, one after the other: its host half, over all of its sites."""

    plan: Plan
    sites: list[Site]
    tail: Tail

    @property
    def device(self) -> torch.device:
        """Where the first layer's slots lie, and what a pass brings is read."""
        return self.sites[0].device

    @property
    def clocks(self) -> Clocks:
        return self.sites[0].clocks

    @property
    def moment(self) -> Moment:
        return self.sites[0].moment

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
        self._asked = self.plan.traits
        for site in self.sites:
            site.moment.plan = self.plan
            site.moment.kinds = (UPDATE,) if every else (PLAIN, UPDATE) if self._cadences else (PLAIN,)

    def _forget(self) -> None:
        self.turn_columns = 0
        self.expected: int | None = None
        self._told: dict[str, Tensor] = {}
        self.passes = {PROMPT: 0, PLAIN: 0, UPDATE: 0}
        self.tail.forget()
        self.finish()

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
        """Open the next pass of the model and say what it is: "prompt", "plain", "update" or "given".

        Args:
            columns: N, new tokens per row, padding included.
            valid: [B, N] bool, False where a column is padding; None where nothing is.
            kind: "prompt" or "generated"; by default one column on a non-empty cache is generated, all else a prompt.
                "given": so many generated passes at once, whose tokens are known (runtime/given.py).
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
            self.advance(opened)
            return opened
        if kind == GIVEN:
            self._begin_given(columns, valid)
            return GIVEN
        if kind != "prompt":
            raise CacheError(f"a pass is of kind prompt, generated or given, not {kind!r}")
        self._begin_prompt(columns, valid, more, told)
        for site in self.sites:
            site.clocks.columns += columns
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
        if valid is None:
            valid = torch.ones(self.plan.batch, columns, dtype=torch.bool, device=self.device)
        return self.clocks.coming(valid.to(self.device).bool())

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

        Whoever calls it owes the device its half, ``advance``, and then the pass and ``finish()``: a recorded step
        replays them.

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
        for site in self.sites:
            site.clocks.count()
            site.moment.columns = 1
        kind = UPDATE if self._update_due() else PLAIN
        self._set(kind)
        self.passes[kind] += 1
        return kind

    def advance(self, kind: str) -> None:
        """The device's half of a generated pass of this kind, which can be recorded and replayed."""
        self._set(kind)
        for site in self.sites:
            site.clocks.advance()

    def _begin_given(self, columns: int, valid: Tensor | None) -> None:
        """Open generated passes whose tokens are all there. The clocks stand at the last one's; every layer goes back,
        and through them by itself."""
        if not 1 <= columns <= self.plan.max_new_tokens - self.clocks.host_t:
            raise CacheError(
                f"this cache was planned for {self.plan.max_new_tokens} generated tokens, has {self.clocks.host_t}, "
                f"and cannot take {columns} more; plan for more (max_new_tokens)"
            )
        before = [tuple(tensor.clone() for tensor in site.clocks.tensors()) for site in self.sites]
        steps: list[str] = []
        for _ in range(columns):
            steps.append(self.open_step(1, valid))
            self.advance(steps[-1])
        for site, stood in zip(self.sites, before, strict=True):
            site.moment.steps, site.moment.before, site.moment.columns = tuple(steps), stood, columns
            site.moment.compiler = None  # a compiled decoder layer says so itself
        self._set(GIVEN)

    def _set(self, kind: str | None) -> None:
        for site in self.sites:
            site.moment.kind = kind

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
        self.turn_columns += columns
        self.tail.open(valid if padded else None, more)
        for site in self.sites:
            here = {name: flags.to(site.device) for name, flags in traits.items()}
            if first:
                site.clocks.open_turn()
            moment = site.moment
            moment.kind, moment.columns, moment.more = PROMPT, columns, more
            moment.first, moment.empty = first, empty and first
            moment.whole = first and empty and not padded
            self._place(site, valid.to(site.device), here)
            if not more:
                site.clocks.close_turn()
        if not more:
            self.turn_columns, self.expected = 0, None

    def _place(self, site: Site, valid: Tensor, traits: Mapping[str, Tensor]) -> None:
        """Reckon on one device where the tokens ``valid`` [B, N] of a prompt pass go."""
        clocks, moment = site.clocks, site.moment
        moment.traits, moment.chunks = traits, ()
        if self.plan.prompt_chunk is None:
            moment.position, moment.places = clocks.prompt(valid, traits)
        else:
            moment.position, moment.places = torch.where(valid, clocks.coming(valid), -1), ()
            moment.chunks = cut(clocks, valid, traits, self.plan.prompt_chunk)

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
        self._set(None)
        self.opened_ahead = False  # whether a stepper opened the pass: the model's hook then must not

    def expect_prompt(self, columns: int) -> None:
        """Announce the columns of the coming prompt turn, so that its chunks know which of them is the last."""
        self.expected = columns


def _known(**flags: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in flags.items() if value is not None}
