"""One pass of one row in one layer: admit, read, attend, observe, update (DESIGN.md section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvpolicy.language import Quantity
from kvpolicy.oracle.pools import Pool, new_pools, share_out, tokens_of, update_order
from kvpolicy.oracle.records import Choice, Hit, PoolStep, Reading, Step
from kvpolicy.oracle.scoring import Scoring, best
from kvpolicy.oracle.signals import softmax
from kvpolicy.oracle.text import Array, Formula, Memory, Page, Rotate, Text, View
from kvpolicy.plan import Plan, PoolPlan

Kept = Sequence[Mapping[str, frozenset[int]]]
"""Per KV head: pool -> positions of the tokens left in it."""

Memories = Mapping[tuple[int, str, int], Mapping[int, Memory]]
"""(KV head, pool, number of a leaf of its scorer) -> {position of a unit: what it remembers}."""


@dataclass
class Pass:
    """The pass at hand, as far as it has come; lists go by KV head."""

    kind: str
    new: int
    fires: bool
    views: list[View] = field(default_factory=list)
    read: list[dict[str, frozenset[int]]] = field(default_factory=list)
    readings: dict[tuple[int, str], Reading] = field(default_factory=dict)
    probabilities: list[Array] = field(default_factory=list)
    output: Array | None = None
    hits: list[Hit] = field(default_factory=list)


class OracleLayer:
    """One row in one layer."""

    def __init__(self, plan: Plan, layer: int, row: int, rotate: Rotate | None = None) -> None:
        shape = plan.geometry
        self.layer, self.row = layer, row
        self.text = Text(shape.query_heads, shape.kv_heads, shape.head_dim**-0.5, rotate)
        self.heads = [new_pools(plan.layers[layer], head) for head in range(shape.kv_heads)]
        self.order = update_order([pool.plan for pool in self._pools()])
        self.updates_chunks = plan.policy.prompt_chunk is not None
        self.special: list[bool] = []
        self.t = self.prompt_len = 0
        self.in_turn = False
        self.taken_over: dict[tuple[int, str, int], dict[int, Memory]] = {}
        self.heard = 0  # tokens of this turn, or of this generated pass

    def step(
        self,
        queries: Array | None,
        keys: Array | None,
        values: Array | None,
        *,
        kind: str,
        more: bool,
        special: Sequence[bool] | None,
        modality: Sequence[str | None] | None,
        formula: Formula,
        logits: Array | None,
    ) -> Step:
        """One pass; ``Oracle.step`` says what everything is."""
        if formula.scaling is not None:
            self.text.scaling = formula.scaling
        self.text.softcap, self.text.sinks = formula.softcap, formula.sinks
        self.taken_over = {}
        for head, pools in enumerate(() if self.in_turn and not self.updates_chunks else self.heads):
            for pool in pools.values():  # what earlier passes left in few bits is read so from now on
                for what, vectors in (("keys", self.text.keys), ("values", self.text.values)):
                    if vectors is not None:
                        pool.store(what, vectors[head])
        self._open(kind, more, self.text.append(queries, keys, values, logits))
        self._admit(special, modality)
        self._read()
        self.arrived = _copied(self.heads) if self.now.readings else self.heads  # for adopt_reading()
        return self._attend_and_learn()

    def adopt_reading(self, read: Sequence[Mapping[str, frozenset[int]]]) -> Step:
        """Do the pass again from step 3, reading what another read: per KV head, pool -> positions."""
        self.heads = _copied(self.arrived)
        self.now.read = [{**own, **theirs} for own, theirs in zip(self.now.read, read, strict=True)]
        for view, shown in zip(self.now.views, self.now.read, strict=True):
            view.read = np.isin(view.tokens, sorted(frozenset().union(*shown.values())))
        self.now.probabilities, self.now.hits = [], []
        return self._attend_and_learn()

    def _attend_and_learn(self) -> Step:
        self._attend()
        self._observe()
        due = any(self._due(pool.plan) for pool in self._pools())
        self.before = _copied(self.heads) if due else self.heads  # for adopt()
        return self._update(None)

    def adopt(self, kept: Kept | None, memory: Memories | None = None) -> Step:
        """Do the last update again, dropping what another dropped; see ``Oracle.adopt``."""
        for place, memories in (memory or {}).items():
            self.taken_over.setdefault(place, {}).update(memories)
        for head, pools in enumerate(self.before):
            for name, pool in pools.items():
                self._take_over(head, name, pool.pages)
        self.heads = _copied(self.before)
        return self._update(kept)

    def _take_over(self, head: int, name: str, pages: Sequence[Page]) -> None:
        """Put what ``adopt`` was given in place of these units' own memories."""
        for page in pages:
            for (at, pool, leaf), memories in self.taken_over.items():
                if (at, pool) == (head, name) and page.position in memories:
                    page.memory[leaf] = memories[page.position]

    def memories(self) -> Memories:
        """What the units remember now."""
        found: dict[tuple[int, str, int], dict[int, Memory]] = {}
        for head, pools in enumerate(self.heads):
            for name, pool in pools.items():
                for page in pool.pages:
                    for leaf, memory in page.memory.items():
                        found.setdefault((head, name, leaf), {})[page.position] = memory
        return found

    def _open(self, kind: str, more: bool, new: int) -> None:
        """The clock advances; the first token of a prompt turn finds every page closed."""
        if kind == "generated" and (new != 1 or self.in_turn):
            raise ValueError("a generated pass brings one token a row, and only when its prompt turn has ended")
        if kind == "prompt" and not self.in_turn:
            self.heard = 0
        if kind == "prompt" and self.heard == 0 and new:
            for pool in self._pools():
                pool.open = False
        self.in_turn = kind == "prompt" and more
        self.t += new if kind == "generated" else 0
        self.prompt_len += new if kind == "prompt" else 0
        self.heard = new if kind == "generated" else self.heard + new
        ends = new > 0 if kind == "prompt" and self.updates_chunks else self.heard > 0 and not self.in_turn
        self.now = Pass(kind, new, fires=ends)

    def _admit(self, special: Sequence[bool] | None, modality: Sequence[str | None] | None) -> None:
        """1. Pools are read top-down; the first that admits a token takes it. Only tokens of a prompt have traits."""
        prompt = self.now.kind == "prompt"
        for token in range(self.now.new):
            self.special.append(prompt and special is not None and bool(special[token]))
            image = modality[token] if prompt and modality else None
            traits = {self.now.kind, image, "special" if self.special[-1] else None}
            position = len(self.special) - 1
            for pools in self.heads:
                taker = next((pool for pool in pools.values() if pool.plan.admits & traits), None)
                if taker is None:
                    raise ValueError(f"no pool admits the {self.now.kind} token at position {position}")
                taker.enter(position, self.t)

    def _read(self) -> None:
        """2. In generated passes, a pool that selects shows its newest page and the best of the others."""
        for head, pools in enumerate(self.heads):
            tokens = np.array(sorted(position for pool in pools.values() for position in pool.positions()), dtype=int)
            everything = np.ones(len(tokens), dtype=bool)
            view = View(self.text, self.layer, head, self.t, self.now.new, tokens, everything)
            read = {name: pool.positions() for name, pool in pools.items()}
            for name, pool in pools.items():
                if self.now.kind == "generated" and pool.plan.read is not None and pool.pages:
                    units = -(-self._tokens(pool.plan.read.top, head) // pool.plan.page)
                    scoring = self._scoring(view, name, np.zeros(len(pool.pages), dtype=bool), reading=True)
                    scores = scoring.scores()
                    older = pool.without_newest()
                    chosen = best(units - int((~older).sum()), pool.pages, scores, older)
                    self.now.readings[head, name] = _reading(pool, scores, older, chosen, scoring.hits)
                    shown = chosen | ~older
                    read[name] = tokens_of([page for page, yes in zip(pool.pages, shown, strict=True) if yes])
            view.read = np.isin(tokens, sorted(frozenset().union(*read.values())))
            self.now.views.append(view)
            self.now.read.append(read)

    def _attend(self) -> None:
        """3. New queries see every read token up to their own, also those that step 5 will drop."""
        outputs = []
        for view in self.now.views:
            probabilities = softmax(np.where(view.read, view.logits(view.asked("all")), -np.inf), view.sinks())
            self.now.probabilities.append(probabilities)
            if self.text.values is not None:
                outputs.append(probabilities @ view.values())
        if outputs:
            self.now.output = np.concatenate(outputs).swapaxes(0, 1)  # [Q, N, D] -> [N, Q, D]

    def _observe(self) -> None:
        """4. Memories take in this pass; those that serve ``prompt-end`` listen to prompts alone."""
        for head, pools in enumerate(self.heads):
            for name, pool in pools.items():
                listens = self.now.kind == "prompt" or pool.plan.cadence > 0
                if pool.plan.budget is not None and listens and self.now.new:
                    scoring = self._scoring(self.now.views[head], name, self._safe(head, pool))
                    scoring.observe(at_update=False)
                    self.now.hits += scoring.hits

    def _update(self, kept: Kept | None) -> Step:
        """5. Where the cadence fires, a pool drops its lowest unprotected units until it is within its budget."""
        choices: dict[tuple[int, str], Choice] = {}
        hits, self.now.hits = self.now.hits, list(self.now.hits)
        for name in self.order:
            due = [head for head, pools in enumerate(self.heads) if name in pools and self._due(pools[name].plan)]
            for heads in _deciding_together(due, [self.heads[head][name].plan for head in due]):
                choices |= self._drop(name, heads, kept)
            for head in due:
                pool = self.heads[head][name]
                pool.size = len(pool.pages) * pool.plan.page
                for page in pool.pages:
                    page.survivor = True
        step = self._record(choices)
        self.now.hits = hits
        return step

    def _drop(self, name: str, heads: Sequence[int], kept: Kept | None) -> dict[tuple[int, str], Choice]:
        """Choose the units that leave a pool, then drop them or move them on."""
        pools = {head: self.heads[head][name] for head in heads}
        scope = pools[heads[0]].plan.scope
        safe = {head: self._safe(head, pool) for head, pool in pools.items()}
        scores = {head: self._scores(head, name, safe[head]) for head in heads}
        if scope == "layer":  # one set for all heads
            average: Array = np.mean(list(scores.values()), axis=0)
            scores = dict.fromkeys(heads, average)
        stay = {head: self._room(head, pool, safe[head]) for head, pool in pools.items()}
        if scope == "across-heads":
            stay = share_out(pools, safe, scores, stay)
        choices = {}
        for head, pool in pools.items():
            candidates = ~safe[head]
            lowest = candidates & ~best(stay[head], pool.pages, scores[head], candidates)
            gone = lowest
            if kept is not None:
                left = [not kept[head][name].issuperset(page.positions) for page in pool.pages]
                gone = candidates & np.array(left, dtype=bool)
            budget = self._tokens(pool.plan.budget, head)
            choices[head, name] = _choice(budget, pool, scores[head], candidates, lowest, gone)
            leaving = [page for page, yes in zip(pool.pages, gone, strict=True) if yes]
            pool.take(leaving)
            for page in sorted(leaving, key=lambda page: page.position) if pool.plan.to is not None else ():
                self.heads[head][str(pool.plan.to)].receive(page, self.t)
        return choices

    def _scores(self, head: int, name: str, safe: Array) -> Array:
        scoring = self._scoring(self.now.views[head], name, safe)
        scoring.observe(at_update=True)
        self._take_over(head, name, self.heads[head][name].pages)
        scores = scoring.scores()
        self.now.hits += scoring.hits
        return scores

    def _scoring(self, view: View, name: str, safe: Array, reading: bool = False) -> Scoring:
        pool = self.heads[view.head][name]
        others = [page for other in self.heads[view.head].values() if other is not pool for page in other.pages]
        scorer = pool.plan.read.scorer if reading and pool.plan.read is not None else pool.plan.scorer
        stay = min(self._room(view.head, pool, safe), int((~safe).sum()))
        return Scoring(view, name, scorer, pool.pages, safe, others, stay, self._names(view.head))

    def _room(self, head: int, pool: Pool, safe: Array) -> int:
        """Units that the budget has room for beside the protected ones: a page counts whole."""
        if pool.plan.budget is None:
            return len(pool.pages)
        return max(0, self._tokens(pool.plan.budget, head) // pool.plan.page - int(safe.sum()))

    def _safe(self, head: int, pool: Pool) -> Array:
        plan = pool.plan
        return pool.protected(self._tokens(plan.first, head), self._tokens(plan.window, head), self.special)

    def _due(self, plan: PoolPlan) -> bool:
        """Every cadence fires at the end of a prompt turn, ``{every: n}`` also where t is a multiple of n."""
        at_clock = self.now.kind == "prompt" or (plan.cadence > 0 and self.t % plan.cadence == 0)
        return self.now.fires and at_clock

    def _tokens(self, quantity: Quantity | None, head: int) -> int:
        """A quantity now, floored once, never below 0."""
        if quantity is None:
            return 0
        value = quantity.evaluate(self._names(head)) if quantity.constant is None else quantity.constant
        return max(0, value.numerator // value.denominator)

    def _names(self, head: int) -> dict[str, int]:
        """Names in expressions, after the pass's tokens were admitted."""
        names = {"t": self.t, "prompt_len": self.prompt_len, "context": self.prompt_len + self.t}
        for name, pool in self.heads[head].items():
            names |= {f"size({name})": pool.size, f"seen({name})": pool.seen}
        return names

    def _pools(self) -> Iterator[Pool]:
        return (pool for pools in self.heads for pool in pools.values())

    def _record(self, choices: Mapping[tuple[int, str], Choice]) -> Step:
        heads = []
        for head, pools in enumerate(self.heads):
            steps = {}
            for name, pool in pools.items():
                kept, safe = pool.positions(), self._safe(head, pool)
                steps[name] = PoolStep(
                    kept=kept,
                    evicted=self.before[head][name].positions() - kept,
                    protected=tokens_of([page for page, yes in zip(pool.pages, safe, strict=True) if yes]),
                    read=self.now.read[head][name],
                    units={page.position: tuple(page.positions) for page in pool.pages},
                    size=pool.size,
                    choice=choices.get((head, name)),
                    reading=self.now.readings.get((head, name)),
                )
            heads.append(steps)
        return Step(
            layer=self.layer,
            row=self.row,
            kind=self.now.kind,
            t=self.t,
            prompt_len=self.prompt_len,
            updated=any(self._due(pool.plan) for pool in self._pools()),
            heads=heads,
            hits=list(self.now.hits),
            attended=[view.tokens for view in self.now.views],
            probabilities=self.now.probabilities,
            output=self.now.output,
        )


def _copied(heads: list[dict[str, Pool]]) -> list[dict[str, Pool]]:
    return [{name: pool.copy() for name, pool in pools.items()} for pools in heads]


def _deciding_together(heads: Sequence[int], plans: Sequence[PoolPlan]) -> list[list[int]]:
    """The KV heads that have something to decide, those together whose scope says so."""
    limited = [(head, plan) for head, plan in zip(heads, plans, strict=True) if plan.budget is not None]
    alone = [[head] for head, plan in limited if plan.scope == "kv-head"]
    shared = [[head for head, plan in limited if plan.scope == scope] for scope in ("layer", "across-heads")]
    return alone + [together for together in shared if together]


def _reading(pool: Pool, scores: Array, older: Array, chosen: Array, hits: Sequence[Hit]) -> Reading:
    rows = list(zip(pool.pages, scores, older, chosen, strict=True))
    among = {page.position: float(score) for page, score, yes, _ in rows if yes}
    units = {page.position: tuple(page.positions) for page, _, yes, _ in rows if yes}
    return Reading(among, units, frozenset(page.position for page, _, _, yes in rows if yes), tuple(hits))


def _choice(budget: int, pool: Pool, scores: Array, candidates: Array, lowest: Array, gone: Array) -> Choice:
    def units(chosen: Array) -> frozenset[int]:
        return frozenset(page.position for page, yes in zip(pool.pages, chosen, strict=True) if yes)

    by_unit = {page.position: float(s) for page, s, yes in zip(pool.pages, scores, candidates, strict=True) if yes}
    return Choice(budget, by_unit, protected=units(~candidates), lowest=units(lowest), dropped=units(gone))
