"""Does a runtime keep what the oracle keeps? Step by step, with float32's doubts counted and shown, never passed over.

A runtime computes scores in float32, the oracle in float64. Where two scores lie closer together than float32 can tell,
either order is right. Such a near-tie is recorded, the oracle takes over the runtime's choice, and the comparison goes
on from there. Any other difference raises ``Disagreement``, whose message shows the step.

How close that is, ``float32.py`` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpolicy.oracle import Choice, Hit, Kept, Memories, Oracle, PoolStep, Rotate, Step
from kvpolicy.plan import Plan, PoolPlan, ScorerPlan
from kvpolicy.testing.float32 import RELATIVE, STEEP, bound, boundary, grain


class Disagreement(AssertionError):
    """The runtime did what the policy does not mean."""


@dataclass(frozen=True)
class NearTie:
    """A choice that float32 could not tell from the oracle's: units by their positions.

    ``gap`` is the largest difference of two scores that were swapped, ``bound`` what float32 may be off by; both are 0
    where a hit on the boundary, in this pass or an earlier one, is the reason (``hit``). With ``reading`` it is about
    what was read: each read units that the other did not. A gap of 0 without it is a tie
    that even float64 sees: more than a few of them mean that the runtime breaks ties the other way.
    """

    layer: int
    row: int
    head: int
    pool: str
    t: int
    oracle: tuple[int, ...]
    runtime: tuple[int, ...]
    gap: float
    bound: float
    hit: bool
    reading: bool = False

    def __str__(self) -> str:
        why = "a hit on the boundary" if self.hit else f"scores {self.gap:.3g} apart, bound {self.bound:.3g}"
        place = f"layer {self.layer}, row {self.row}, KV head {self.head}, pool {self.pool}, t {self.t}"
        does = "reads" if self.reading else "drops"
        return f"{place}: oracle {does} {list(self.oracle)}, runtime {list(self.runtime)} ({why})"


@dataclass
class Agreement:
    """An oracle that runs beside a runtime of the same plan, layer by layer and pass by pass.

    ``relative`` is the bound on scores, ``output_tolerance`` that on attention (of its greatest number, or of 1) while
    scaled logits are at most ``STEEP``; beyond, it grows with them, since float32 holds their differences the worse;
    ``rotate`` is the oracle's. ``compared`` counts the kept sets compared (row x layer x KV head x pass).
    """

    plan: Plan
    rows: int = 1
    relative: float = RELATIVE
    output_tolerance: float = 1e-4
    rotate: Rotate | None = None
    oracle: Oracle = field(init=False)
    compared: int = field(default=0, init=False)
    near_ties: list[NearTie] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.oracle = Oracle(self.plan, rows=self.rows, rotate=self.rotate)
        self.doubts: dict[tuple[int, int], Doubts] = {}
        self.longest_key = 0.0

    def check(
        self,
        layer: int,
        query: Any,
        key: Any,
        value: Any,
        positions: Any | None,
        *,
        valid: Any | None = None,
        kind: str | None = None,
        more: bool = False,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Any | None = None,
        special: Any | None = None,
        modality: Sequence[Sequence[str | None]] | None = None,
        output: Any | None = None,
        memory: Sequence[Memories] | None = None,
        read: Sequence[Sequence[Mapping[str, frozenset[int]]]] | None = None,
    ) -> list[Step]:
        """Give the oracle one pass of one layer, and compare. Arrays or tensors, as the runtime's layer takes them.

        Args:
            query, key, value: [B, Q, N, D], [B, K, N, D], [B, K, N, D].
            positions: [B, K, S] positions in the layer's slots after the pass, -1 for empty; None compares nothing (a
                runtime need not have settled before its prompt turn ends).
            scaling, softcap, sinks: as ``Oracle.step`` takes them.
            valid: [B, N] bool, False for padding; ``special`` and ``modality`` likewise go by column.
            kind: "prompt" or "generated"; by default one column on a text that has begun is generated.
            output: [B, N, Q, D] of the runtime's attention, compared where valid.
            memory: one mapping a row of what the runtime's units remember after the pass. Stamps of hits must then be
                the oracle's own, and where a hit lay on the boundary the oracle takes over the runtime's.
            read: per row and KV head the positions read of each pool that selects, where that is known.

        Raises:
            Disagreement: the first difference that float32 does not explain.
        """
        query, key, value = array(query), array(key), array(value)
        columns = np.ones((len(key), key.shape[2])) if valid is None else array(valid)
        rows = [np.flatnonzero(row) for row in columns]
        steps = self.oracle.step(
            layer,
            [query[b][:, c] for b, c in enumerate(rows)],
            [key[b][:, c] for b, c in enumerate(rows)],
            [value[b][:, c] for b, c in enumerate(rows)],
            kind=kind or ("generated" if key.shape[2] == 1 and not more and self._begun(layer) else "prompt"),
            more=more,
            special=None if special is None else [array(special)[b][c] for b, c in enumerate(rows)],
            modality=None if modality is None else [[modality[b][int(n)] for n in c] for b, c in enumerate(rows)],
            scaling=scaling,
            softcap=softcap,
            sinks=None if sinks is None else array(sinks),
        )
        self.longest_key = max(self.longest_key, _longest(key))
        most = _longest(query) * self.longest_key * (scaling or query.shape[-1] ** -0.5)
        for row, step in enumerate(steps):
            if read is not None:
                steps[row] = step = self._check_read(step, read[row])
            if output is not None:
                self._check_output(step, array(output)[row][rows[row]], self.output_tolerance * max(1.0, most / STEEP))
            doubts = self.doubts.setdefault((layer, row), Doubts())
            doubts.take(step.hits, self._scorers(layer), self.relative)
            if memory is not None:
                steps[row] = step = self._check_memory(step, memory[row], doubts)
            if positions is not None:
                steps[row] = self._check_kept(step, self._kept(layer, array(positions)[row]), doubts)
        return steps

    def summary(self) -> str:
        """One line, then one for each near-tie."""
        head = f"{self.compared} kept sets compared, {len(self.near_ties)} near-ties"
        return "\n".join([head, *(f"  {tie}" for tie in self.near_ties)])

    def _begun(self, layer: int) -> bool:
        return any(row.text.length for row in self.oracle.layers[layer])

    def _pools(self, layer: int, head: int) -> Sequence[PoolPlan]:
        plan = self.plan.layers[layer]
        return plan.pools if plan.heads is None else plan.heads[head]

    def _scorers(self, layer: int) -> dict[tuple[int, str], ScorerPlan]:
        heads = range(self.plan.geometry.kv_heads)
        return {(head, pool.name): pool.scorer for head in heads for pool in self._pools(layer, head)}

    def _kept(self, layer: int, positions: np.ndarray) -> list[dict[str, frozenset[int]]]:
        """Slots [K, S] -> positions by pool: each pool's slots are a stretch of the layer's."""
        kept = []
        for head, slots in enumerate(positions):
            pools = {}
            for pool in self._pools(layer, head):
                held = [int(p) for p in slots[pool.offset : pool.offset + pool.capacity] if p >= 0]
                pools[pool.name] = frozenset(held)
                if len(pools[pool.name]) != len(held):
                    twice = sorted({p for p in held if held.count(p) > 1})
                    raise Disagreement(
                        f"layer {layer}, KV head {head}, pool {pool.name}: positions {twice} lie in two slots"
                    )
            kept.append(pools)
        return kept

    def _check_read(self, step: Step, read: Sequence[Mapping[str, frozenset[int]]]) -> Step:
        """Equal, or explained by float32; then the oracle reads what the runtime read."""
        ties = []
        for head, pools in enumerate(read):
            for pool in self._pools(step.layer, head):
                own, theirs = step.heads[head][pool.name], pools.get(pool.name)
                if theirs is None or own.read == theirs:
                    continue
                tie = self._near_reading(step, head, pool, own, theirs)
                if tie is None:
                    raise Disagreement(
                        f"layer {step.layer}, row {step.row}, KV head {head}, pool {pool.name}, t {step.t}: the oracle "
                        f"reads {sorted(own.read)}, the runtime {sorted(theirs)}"
                    )
                ties.append(tie)
        self.near_ties += ties
        return self.oracle.adopt_reading(step.layer, step.row, read) if ties else step

    def _near_reading(
        self, step: Step, head: int, pool: PoolPlan, own: PoolStep, theirs: frozenset[int]
    ) -> NearTie | None:
        """What excuses another choice of what is read, or None."""
        assert own.reading is not None and pool.read is not None
        scores, units = own.reading.scores, own.reading.units
        chosen = frozenset(unit for unit in scores if unit in theirs)
        always = own.read - {token for unit in own.reading.chosen for token in units[unit]}
        if always.union(*(units[unit] for unit in chosen)) != theirs:
            return None
        lost, won = own.reading.chosen - chosen, chosen - own.reading.chosen
        if len(lost) != len(won):
            return None
        kind, gap, most = grain(pool.read.scorer), 0.0, 0.0
        leaves = list(pool.read.scorer.leaves())
        unsure = {unit for hit in own.reading.hits for unit in boundary(hit, leaves[hit.leaf], self.relative)}
        for high, low in ((a, b) for a in lost - unsure for b in won - unsure):
            limit = bound(kind, self.relative, scores, high, low)
            if kind == "exact" or scores[high] - scores[low] > limit:
                return None
            gap, most = max(gap, scores[high] - scores[low]), max(most, limit)
        place = (step.layer, step.row, head, pool.name, step.t)
        return NearTie(*place, tuple(sorted(lost)), tuple(sorted(won)), gap, most, bool(unsure), reading=True)

    def _check_kept(self, step: Step, kept: Kept, doubts: Doubts) -> Step:
        """Equal, or explained by float32; then the oracle goes on from the runtime's choice."""
        self.compared += len(kept)
        if _same(step, kept):
            return step
        adopted = self.oracle.adopt(step.layer, step.row, kept)
        explained = _same(adopted, kept)
        ties = []
        for head, pools in enumerate(adopted.heads):
            for pool in self._pools(step.layer, head):
                choice = pools[pool.name].choice
                if choice is not None and choice.dropped != choice.lowest and explained:
                    tie = self._near_tie(adopted, head, pool, choice, doubts)
                    explained = tie is not None
                    ties += [tie] if tie is not None else []
        if not explained:
            raise Disagreement(describe(step, kept))
        self.near_ties += ties
        return adopted

    def _near_tie(self, step: Step, head: int, pool: PoolPlan, choice: Choice, doubts: Doubts) -> NearTie | None:
        """What excuses a choice, or None."""
        heads = range(len(step.heads)) if pool.scope == "layer" else [head]
        unsure = frozenset().union(*(doubts.of(h, pool.name) for h in heads))
        if pool.scope == "across-heads":
            if not self._heads_may_differ(step, pool, unsure):
                return None
        elif len(choice.dropped) != len(choice.lowest):
            return None
        gap = bound = 0.0
        kept = choice.scores.keys() - choice.dropped
        for high, low in ((a, b) for a in choice.dropped - unsure for b in kept - unsure):
            apart = choice.scores[high] - choice.scores[low]
            if apart > 0 or (apart == 0 and high > low):
                limit = self._bound(pool, choice.scores, high, low)
                if limit is None or apart > limit:
                    return None
                gap, bound = max(gap, apart), max(bound, limit)
        dropped = tuple(sorted(choice.lowest)), tuple(sorted(choice.dropped))
        hit = bool((choice.dropped ^ choice.lowest) & unsure)
        return NearTie(step.layer, step.row, head, pool.name, step.t, *dropped, gap, bound, hit)

    def _heads_may_differ(self, step: Step, pool: PoolPlan, unsure: frozenset[int]) -> bool:
        """Whether heads that compete for room may have shared it out otherwise: where units of two heads nearly tie."""
        choices = [choice for pools in step.heads if (choice := pools[pool.name].choice) is not None]
        moved = sum(abs(len(choice.dropped) - len(choice.lowest)) for choice in choices)
        if not moved or unsure:
            return True
        units = [(score, head) for head, choice in enumerate(choices) for score in choice.scores.values()]
        scores = dict(enumerate(score for score, _ in units))
        pairs = [(a, b) for a in scores for b in range(a) if units[a][1] != units[b][1]]
        near = [abs(scores[a] - scores[b]) <= (self._bound(pool, scores, a, b) or -1) for a, b in pairs]
        return moved <= 2 * sum(near)

    def _bound(self, pool: PoolPlan, scores: Mapping[int, float], a: int, b: int) -> float | None:
        """How far apart two final scores may be; None where float32 holds them exactly (not so a mean over heads)."""
        kind = grain(pool.scorer)
        return None if kind == "exact" and pool.scope != "layer" else bound(kind, self.relative, scores, a, b)

    def _check_memory(self, step: Step, memory: Memories, doubts: Doubts) -> Step:
        """Stamps of certain hits must be equal; of uncertain ones, the oracle takes over the runtime's."""
        own = self.oracle.memories(step.layer, step.row)
        taken: dict[tuple[int, str, int], dict[int, Any]] = {}
        for (head, pool, number), units in memory.items():
            kind = list(self._scorers(step.layer)[head, pool].leaves())[number].memory[0]
            for unit, value in units.items():
                theirs = own.get((head, pool, number), {}).get(unit, value)
                if unit in doubts.units.get((head, pool, number), ()):
                    taken.setdefault((head, pool, number), {})[unit] = value
                elif kind in ("last-hit", "recurrence") and value != theirs:
                    raise Disagreement(
                        f"layer {step.layer}, row {step.row}, KV head {head}, pool {pool}, t {step.t}: the unit at "
                        f"position {unit} remembers {value}, the oracle's {theirs} ({kind}); no hit was on the boundary"
                    )
        if not taken:
            return step
        for place, units in taken.items():
            doubts.units[place] -= units.keys()
        return self.oracle.adopt(step.layer, step.row, None, taken)

    def _check_output(self, step: Step, output: np.ndarray, tolerance: float) -> None:
        assert step.output is not None
        if not output.size:
            return
        error = np.abs(output - step.output).max() / max(1.0, np.abs(step.output).max())
        if not error <= tolerance:
            raise Disagreement(
                f"layer {step.layer}, row {step.row}, t {step.t} ({step.kind} pass): attention is {error:.3g} off the "
                f"oracle's, which may be {tolerance:.3g}"
            )


@dataclass
class Doubts:
    """Units of one row and layer whose last hits float32 may have seen otherwise, by (KV head, pool, leaf)."""

    units: dict[tuple[int, str, int], set[int]] = field(default_factory=dict)

    def of(self, head: int, pool: str) -> frozenset[int]:
        return frozenset(u for (h, p, _), units in self.units.items() if (h, p) == (head, pool) for u in units)

    def take(self, hits: Sequence[Hit], scorers: Mapping[tuple[int, str], ScorerPlan], relative: float) -> None:
        """Add the units on a boundary; a certain hit settles ``last-hit``; without memory each pass stands alone."""
        begun = set()
        for hit in hits:
            place = hit.head, hit.pool, hit.leaf
            leaf = list(scorers[hit.head, hit.pool].leaves())[hit.leaf]
            unsure = self.units.setdefault(place, set())
            on_boundary = boundary(hit, leaf, relative)
            if not leaf.remembers and place not in begun:
                unsure.clear()
                begun.add(place)
            elif leaf.memory[0] == "last-hit":
                unsure -= hit.hits
            unsure |= on_boundary


def _longest(vectors: np.ndarray) -> float:
    """The length of the longest vector; the last axis is D."""
    return float(np.linalg.norm(vectors, axis=-1).max(initial=0.0))


def describe(step: Step, kept: Kept) -> str:
    """The first difference of a step: what each kept, and why the oracle did."""
    for head, pools in enumerate(step.heads):
        for name, pool in pools.items():
            if pool.kept != kept[head][name]:
                return "\n".join(
                    [
                        f"oracle and runtime part at layer {step.layer}, row {step.row}, KV head {head}, pool {name}, "
                        f"t {step.t} ({step.kind} pass, prompt_len {step.prompt_len}):",
                        f"  kept by the oracle alone:  {sorted(pool.kept - kept[head][name])}",
                        f"  kept by the runtime alone: {sorted(kept[head][name] - pool.kept)}",
                        f"  the oracle keeps   {sorted(pool.kept)}",
                        f"  the runtime keeps  {sorted(kept[head][name])}",
                        *_reasons(pool.choice),
                    ]
                )
    return "oracle and runtime agree"


def _reasons(choice: Choice | None) -> list[str]:
    if choice is None:
        return ["  the pool was not to be updated in this pass, or has no budget"]
    ranking = sorted(choice.scores, key=lambda unit: (choice.scores[unit], unit))
    return [
        f"  budget {choice.budget}, protected units {sorted(choice.protected)}",
        f"  units the oracle drops: {sorted(choice.lowest)}",
        "  scores, lowest first: " + ", ".join(f"{unit}: {choice.scores[unit]:.9g}" for unit in ranking),
    ]


def _same(step: Step, kept: Kept) -> bool:
    return all(pool.kept == kept[head][name] for head, pools in enumerate(step.heads) for name, pool in pools.items())


def array(values: Any) -> np.ndarray:
    """An array of what may be a tensor on any device (no torch is imported)."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)
