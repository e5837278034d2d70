"""What holds for every policy (DESIGN.md section 6), on policies drawn at random from the whole language."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from kvpolicy.errors import KvpolicyError
from kvpolicy.oracle import Oracle, Step
from kvpolicy.plan import Plan, PoolPlan
from tests.oracle.kit import Talk, history, plan_of

SEEDS = range(48)


class Draw:
    """A policy's pools as YAML text, from a seed. Not every draw is a valid policy."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def one(self, *choices: object) -> str:
        return str(choices[self.random.integers(len(choices))])

    def maybe(self, key: str, *choices: object, odds: float = 0.5) -> list[str]:
        return [f"{key}: {self.one(*choices)}"] if self.random.random() < odds else []

    def leaf(self, reading: bool = False) -> str:
        signals = ["attention"] * 4 + ["attention-logit", "page-bound", "recency", "{random: {seed: 3}}", "key-norm"]
        signals += ["value-norm", "key-anchor", "{key-similarity: {above: 0.3}}"]
        parts = [f"signal: {self.one(*signals)}"]
        looks = any(name in parts[0] for name in ("attention", "page-bound"))
        if looks:
            parts += self.maybe("heads", "max", "sum", "{logits: max}")
            parts += [] if reading else self.maybe("queries", "all", "{last: 3}")
        parts += self.maybe("over", "pool", "candidates", odds=0.3 if "attention" in parts[0] else 0)
        parts += self.maybe("smooth", "{max: 3}", "{mean: 5}", odds=0.2)
        parts += self.maybe("norm", "max", "softmax", "mass", odds=0.2)
        hit = [] if reading else self.maybe("hit", "{top: 30%}", "{above: 0.05}", odds=0.3)
        memories = ["last-hit", "{recurrence: 0.5}", "sum"] if hit else ["sum", "{decay: 0.8}", "{max-decay: 0.9}"]
        return ", ".join(parts + hit + ([] if reading else self.maybe("memory", *memories)))

    def scorer(self) -> str:
        if self.random.random() < 0.25:
            parts = [f"{{{self.leaf()}, weight: {self.one(0.5, 2, -1)}}}" for _ in range(2)]
            return f"{{{self.one('sum', 'product')}: [{', '.join(parts)}]}}"
        return f"{{{self.leaf()}}}"

    def pool(self, admit: str, to: str = "", page: int | None = None) -> str:
        budget = self.one(24, 32, "8 + t // 4", "20% * context + 10", '"if(t < 9, 40, 18)"', '"max(9, 40 - t)"')
        scope = self.one("kv-head", "layer", "across-heads, floor: 30%") + (f", to: {to}" if to else "")
        parts = [f"budget: {budget}"] + ([f"admit: {admit}"] if admit else [])
        parts += self.maybe("page", 2, 4, 5, odds=0.4) if page is None else [f"page: {page}"]
        parts += [*self.maybe("window", 3, 5, "2 + t // 9", odds=0.6), f"scorer: {self.scorer()}"]
        parts += self.maybe("pinned", "{first: 2}", "{tokens: special}", "survivors", "[{first: 1}, {tokens: special}]")
        parts += self.maybe("update", "{every: 3}", "{every: 7}", "prompt-end")
        if self.random.random() < 0.2:
            parts.append(f"read: {{top: 12, scorer: {{{self.leaf(reading=True)}}}}}")
        parts += self.maybe("store", "{bits: 8, group: 2}", "{bits: 4, group: 3, keys: token}", odds=0.15)
        return "{" + ", ".join([*parts, f"evict: {{scope: {scope}}}"]) + "}"

    def pools(self) -> str:
        if self.random.random() < 0.4:
            return f"all: {self.pool('all')}"
        if self.random.random() < 0.3:
            page = self.one(1, 2, 4)
            return f"hot: {self.pool('all', to='cold', page=page)}\ncold: {self.pool('', page=page)}"
        special = self.maybe("marked", "{admit: {tokens: special}}", odds=0.2)
        return "\n".join([*special, f"prompt: {self.pool('prompt')}", f"rest: {self.pool('generated')}"])


def passes(talk: Talk) -> list[tuple[slice, str, bool]]:
    """A prompt in two chunks, generated tokens, a second turn of three tokens, generated tokens."""
    prompt = [(slice(0, 9), "prompt", True), (slice(9, 14), "prompt", False)]
    first = [(slice(n, n + 1), "generated", False) for n in range(14, 40)]
    second = [(slice(40, 43), "prompt", False)]
    return prompt + first + second + [(slice(n, n + 1), "generated", False) for n in range(43, 60)]


SPECIAL = {0, 7, 42}
"""Every seventh token is flagged; these are of a prompt."""


def fed(oracle: Oracle, talks: list[Talk]) -> list[list[Step]]:
    """Every pass of every row: by pass, then row."""
    steps = []
    for part, kind, more in passes(talks[0]):
        arrays = [[getattr(talk, name)[:, part] for talk in talks] for name in ("queries", "keys", "values")]
        special = [[position % 7 == 0 for position in range(part.start, part.stop)] for _ in talks]
        steps.append(oracle.step(0, *arrays, kind=kind, more=more, special=special))
    return steps


@cache
def drawn(seed: int) -> tuple[str, Plan]:
    """The first valid policy after this seed, and its plan."""
    for attempt in range(20):
        pools = Draw(100 * seed + attempt).pools()
        try:
            return pools, plan_of(pools, query_heads=4, kv_heads=2, head_dim=4, prompt=17, new=43, turns=2)
        except KvpolicyError:
            continue
    raise AssertionError(f"seed {seed}: twenty draws in a row were no policies; the last:\n{pools}")


def talk_of(seed: int) -> Talk:
    return Talk(seed, prompt=14, steps=46, head_dim=4)


@cache
def run(seed: int) -> list[Step]:
    return [rows[0] for rows in fed(Oracle(drawn(seed)[1]), [talk_of(seed)])]


def pools_of(seed: int) -> dict[str, PoolPlan]:
    return {pool.name: pool for pool in drawn(seed)[1].layers[0].pools}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_token_is_in_one_pool_or_gone_for_good(seed: int) -> None:
    gone = [set[int](), set[int]()]
    for step in run(seed):
        for head, pools in enumerate(step.heads):
            kept = [position for pool in pools.values() for position in pool.kept]
            assert len(kept) == len(set(kept)) and set(kept) <= set(range(step.prompt_len + step.t))
            assert not gone[head] & set(kept)
            gone[head] = set(range(step.prompt_len + step.t)) - set(kept)
            assert set(step.attended[head]) == set(kept) | {p for pool in pools.values() for p in pool.evicted}


@pytest.mark.parametrize("seed", SEEDS)
def test_updates_drop_what_is_over_the_budget_and_nothing_safe(seed: int) -> None:
    plans = pools_of(seed)
    for step in run(seed):
        for pools in step.heads:
            for name, pool in pools.items():
                if pool.choice is None:
                    assert not pool.evicted
                    continue
                choice, page = pool.choice, plans[name].page
                assert choice.dropped == choice.lowest and not choice.dropped & choice.protected
                if plans[name].scope != "across-heads":
                    held = len(pool.units) * page
                    assert held <= max(choice.budget, page * len(choice.protected))
                    if choice.dropped:  # one more would not have fitted
                        assert held + page > choice.budget
                    if plans[name].scope == "kv-head":
                        stayed = choice.scores.keys() - choice.dropped
                        lowest = {(choice.scores[unit], unit) for unit in choice.dropped}
                        assert not lowest or not stayed or max(lowest) < min((choice.scores[u], u) for u in stayed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_plan_bounds_what_is_resident(seed: int) -> None:
    plans = pools_of(seed)
    for before, step in zip([None, *run(seed)], run(seed), strict=False):
        for head, pools in enumerate(step.heads):
            for name, pool in pools.items():
                plan, held = plans[name], len(pool.units) * plans[name].page
                if pool.choice is not None and plan.scope != "across-heads":
                    assert held <= plan.bound, f"{name} holds {held} after an update at t {step.t}"
                if step.kind == "generated" and plan.scope != "across-heads" and plan.admits:
                    assert before is not None
                    entered = pool.kept | pool.evicted
                    opened = held + plan.page * len({u for u in before.heads[head][name].units if u in pool.evicted})
                    assert opened <= plan.capacity and len(entered) <= plan.capacity


@pytest.mark.parametrize("seed", SEEDS)
def test_pinned_and_window_tokens_stay(seed: int) -> None:
    plans = pools_of(seed)
    for before, step in zip(run(seed), run(seed)[1:], strict=False):
        for was, now in zip(before.heads, step.heads, strict=True):
            for name, pool in now.items():
                if plans[name].pin_special:
                    assert was[name].kept & SPECIAL <= pool.kept
                if plans[name].pin_survivors and was[name].choice is not None:
                    assert was[name].kept <= pool.kept
                assert all(abs(total - 1) < 1e-12 for total in step.probabilities[0].sum(axis=-1).ravel())


@pytest.mark.parametrize("seed", SEEDS[::6])
def test_rows_are_alone(seed: int) -> None:
    talks = [talk_of(seed), talk_of(seed + 1000)]
    both = fed(Oracle(drawn(seed)[1], rows=2), talks)
    alone = [fed(Oracle(drawn(seed)[1]), [talk]) for talk in talks]
    for together, first, second in zip(both, *alone, strict=True):
        assert history(together) == history([first[0], second[0]])


@pytest.mark.parametrize("seed", SEEDS[::6])
def test_adopting_ones_own_choice_changes_nothing(seed: int) -> None:
    talk, oracle = talk_of(seed), Oracle(drawn(seed)[1])
    adopted = []
    for part, kind, more in passes(talk):
        arrays = [[array[:, part]] for array in (talk.queries, talk.keys, talk.values)]
        special = [[position % 7 == 0 for position in range(part.start, part.stop)]]
        step = oracle.step(0, *arrays, kind=kind, more=more, special=special)[0]
        kept = [{name: pool.kept for name, pool in pools.items()} for pools in step.heads]
        adopted.append(oracle.adopt(0, 0, kept, oracle.memories(0, 0) if "last" not in drawn(seed)[0] else None))
    assert [step.heads for step in adopted] == [step.heads for step in run(seed)]


def test_the_draws_reach_the_language() -> None:
    texts = " ".join(drawn(seed)[0] for seed in SEEDS)
    features = "page: read: store: survivors special last-hit recurrence max-decay sum: product: across-heads layer"
    features += " if( max("
    features += " smooth norm: candidates key-similarity key-anchor page-bound random prompt-end every: hit: to: cold"
    assert [feature for feature in features.split() if feature not in texts] == []
