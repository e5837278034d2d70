"""What the oracle's tests share: a plan from the pools of a policy, texts of random vectors, and a way to run them."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import dedent, indent

import numpy as np

from kvpolicy.language import loads_policy
from kvpolicy.oracle import Oracle, Step
from kvpolicy.plan import ModelGeometry, Plan, make_plan


def plan_of(
    pools: str,
    top: str = "",
    *,
    query_heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 4,
    layers: int = 1,
    prompt: int | tuple[int, int] = (0, 64),
    new: int = 256,
    turns: int = 4,
) -> Plan:
    """The plan of a policy that has these ``pools``, and whatever keys of the top level are needed."""
    text = f"kvpolicy: 1\nname: test\n{dedent(top)}\npools:\n{indent(dedent(pools).strip(), '  ')}\n"
    geometry = ModelGeometry("test", layers, query_heads, kv_heads, head_dim)
    return make_plan(loads_policy(text), geometry, prompt=prompt, max_new_tokens=new, turns=turns)


class Picture:
    """A one-row, one-layer oracle that is shown attention as probabilities, one list over positions per query."""

    def __init__(self, pools: str, top: str = "", **shape: int) -> None:
        self.plan = plan_of(pools, top, **shape)
        self.oracle = Oracle(self.plan)
        self.length = 0

    def prompt(self, *rows: Sequence[float], more: bool = False, **flags: Sequence) -> Step:
        """A prompt pass; ``rows[n]`` holds the attention of query n over all positions so far (the rest is 0)."""
        return self._pass(rows, "prompt", more, flags)

    def tokens(self, count: int, more: bool = False, **flags: Sequence) -> Step:
        """A prompt pass of ``count`` tokens that attend evenly."""
        return self._pass([[1.0] * (self.length + n + 1) for n in range(count)], "prompt", more, flags)

    def say(self, row: Sequence[float] | None = None, **flags: Sequence) -> Step:
        """A generated pass, evenly attentive unless told otherwise."""
        return self._pass([row or [1.0] * (self.length + 1)], "generated", False, flags)

    def heads(self, *heads: Sequence[Sequence[float]], kind: str) -> Step:
        """A pass of several query heads: ``heads[q][n]`` as above."""
        return self._step(np.array([[self._logits(row, len(head)) for row in head] for head in heads]), kind, False, {})

    def _pass(self, rows: Sequence[Sequence[float]], kind: str, more: bool, flags: dict[str, Sequence]) -> Step:
        logits = np.array([[self._logits(row, len(rows)) for row in rows]])
        return self._step(np.repeat(logits, self.plan.geometry.query_heads, axis=0), kind, more, flags)

    def _logits(self, row: Sequence[float], new: int) -> np.ndarray:
        padded = np.zeros(self.length + new)
        padded[: len(row)] = row
        with np.errstate(divide="ignore"):
            return np.log(padded)

    def _step(self, logits: np.ndarray, kind: str, more: bool, flags: dict[str, Sequence]) -> Step:
        self.length += logits.shape[1]
        given = {name: [flag] for name, flag in flags.items()}
        return self.oracle.step(0, None, None, logits=[logits], kind=kind, more=more, **given)[0]


def kept(step: Step, pool: str, head: int = 0) -> list[int]:
    return sorted(step.heads[head][pool].kept)


def resident(step: Step, head: int = 0) -> list[int]:
    return sorted(position for pool in step.heads[head].values() for position in pool.kept)


def scores(step: Step, pool: str, head: int = 0) -> dict[int, float]:
    """The candidates' scores in this pass's update, rounded so that they compare with numbers worked out by hand."""
    choice = step.heads[head][pool].choice
    assert choice is not None
    return {unit: round(score, 9) for unit, score in choice.scores.items()}


class Talk:
    """Random queries, keys and values of one row: a prompt, then one token at a time."""

    def __init__(self, seed: int, prompt: int, steps: int, query_heads: int = 4, kv_heads: int = 2, head_dim: int = 8):
        random = np.random.default_rng(seed)
        total = prompt + steps
        self.prompt, self.steps = prompt, steps
        self.queries = 1.5 * random.normal(size=(query_heads, total, head_dim))
        self.keys = 1.5 * random.normal(size=(kv_heads, total, head_dim))
        self.values = random.normal(size=(kv_heads, total, head_dim))
        self.shape = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}

    def passes(self) -> list[slice]:
        starts = range(self.prompt, self.prompt + self.steps)
        return [slice(0, self.prompt)] * (self.prompt > 0) + [slice(n, n + 1) for n in starts]

    def run(self, pools: str, top: str = "", **plan: int) -> list[Step]:
        """The steps of a policy on this text."""
        made = plan_of(pools, top, prompt=self.prompt, new=plan.pop("new", self.steps), **self.shape, **plan)
        oracle = Oracle(made)
        steps = []
        for part in self.passes():
            kind = "prompt" if part.stop == self.prompt else "generated"
            arrays = [[array[:, part]] for array in (self.queries, self.keys, self.values)]
            steps += oracle.step(0, *arrays, kind=kind)
        return steps

    def probabilities(self, query: int, head: int, tokens: Sequence[int]) -> np.ndarray:
        """[G, tokens]: softmax of one query over the given tokens, for the query heads of one KV head."""
        group = len(self.queries) // len(self.keys)
        logits = self.queries[head * group : (head + 1) * group, query] @ self.keys[head][list(tokens)].T
        weights = np.exp(logits / np.sqrt(self.keys.shape[-1]))
        return weights / weights.sum(axis=1, keepdims=True)


def history(steps: Sequence[Step]) -> list[list[list[int]]]:
    """Resident positions by step and head, whatever the pools are called."""
    return [[resident(step, head) for head in range(len(step.heads))] for step in steps]
