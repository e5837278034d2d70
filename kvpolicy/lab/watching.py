"""What is seen of a run while it lasts: the text piece by piece, the time of each token, and how many tokens stay."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

from kvpolicy.runtime import PolicyCache

Write = Callable[[str], None]


class Watch(TextStreamer):
    """A streamer for one row. What it does itself is on no clock.

    Args:
        write: gets the text piece by piece, words when they are certain.
        graphs: says how many graphs were compiled so far; the steps that compile are timed apart.
        each: gets every token after it was noted.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Write,
        *,
        cache: PolicyCache,
        graphs: Callable[[], int],
        each: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.graphs, self.each = write, graphs, each
        self.residents = Residents(cache)
        self.tokens: list[int] = []
        self.prompt_seconds = self.step_seconds = self.compile_seconds = 0.0
        self.timed = self.compiled = 0
        self.mark = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt's ids, then with each new token."""
        if self.next_tokens_are_prompt:
            super().put(value)
            return
        new = value.flatten().tolist()  # waits for the device
        self._clock(time.perf_counter() - self.mark, len(new))
        self.tokens += new
        super().put(value)
        self.residents.note()
        if self.each is not None:
            for token in new:
                self.each(token)
        self.mark = time.perf_counter()

    def _clock(self, seconds: float, new: int) -> None:
        graphs = self.graphs()
        if not self.tokens:
            self.prompt_seconds = seconds
        elif graphs > self.compiled:
            self.compile_seconds += seconds
        else:
            self.step_seconds += seconds
            self.timed += new
        self.compiled = graphs

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the prompt, those that compiled left out; 0 where there was none."""
        return self.timed / self.step_seconds if self.step_seconds else 0.0


class Residents:
    """Tokens that are resident after updates, counted on the tensors: the most of any layer, row and KV head.

    A pool counts as it was when its update last fired; one that has no update counts as it is. `after` lists
    (t, tokens of the fullest layer) for each step at which some pool was updated, the prompt's end as t = 0.
    """

    def __init__(self, cache: PolicyCache) -> None:
        self.cache = cache
        self.kept: list[dict[str, Tensor]] = [{} for _ in cache.parts()]
        self.after: list[tuple[int, int]] = []

    @torch.no_grad()
    def note(self, last: bool = False) -> None:
        """After a pass; `last` after the last one of all."""
        t = self.cache.clocks.host_t
        fired = False
        for part, kept in zip(self.cache.parts(), self.kept, strict=True):
            for pool in part.plan.pools:
                updated = t == 0 or (pool.cadence > 0 and t % pool.cadence == 0)
                fired |= updated and pool.evicts
                if (updated if pool.evicts else fired or last) or pool.name not in kept:
                    kept[pool.name] = (part.state.pool_positions(pool) >= 0).flatten(2).sum(-1)
        if fired or last or not self.after:
            self.after.append((t, max(int(self._total(kept).max()) for kept in self.kept)))

    @staticmethod
    def _total(kept: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(kept.values())).sum(0)

    def everywhere(self) -> tuple[list[tuple[int, int]], dict[str, int]]:
        """``after`` and ``pools`` over the KV heads of all ranks that share the model. All of them must call it."""
        told = self.cache.ranks.collect((self.after, self.pools()))
        moments = zip(*(after for after, _ in told), strict=True)
        names = dict.fromkeys(name for _, pools in told for name in pools)
        return (
            [(moment[0][0], max(tokens for _, tokens in moment)) for moment in moments],
            {name: max(pools.get(name, 0) for _, pools in told) for name in names},
        )

    def pools(self) -> dict[str, int]:
        """By pool, the most tokens kept at its last update."""
        found: dict[str, int] = {}
        for kept in self.kept:
            for name, counts in kept.items():
                found[name] = max(found.get(name, 0), int(counts.max()))
        return found


@torch.no_grad()
def kept_by_row(cache: PolicyCache) -> tuple[list[int], list[int]]:
    """By row, tokens that left so far over all layers and KV heads, and the most that any of them holds now."""
    evicted, held = torch.zeros(cache.plan.batch, dtype=torch.int64, device=cache.device), []
    for part in cache.parts():
        held.append((part.state.all_positions >= 0).sum(-1).amax(1))
        for pool in (pool for pool in part.plan.pools if pool.to is None):
            here = (part.state.pool_positions(pool) >= 0).flatten(2).sum(-1)
            evicted += (part.state.seen(pool).expand_as(here) - here).sum(1)
    return evicted.tolist(), torch.stack(held).amax(0).tolist()


class StopWhen(StoppingCriteria):
    """Ends a generation after the token at hand once somebody asks for it, so that the cache stays whole."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked(), dtype=torch.bool, device=input_ids.device)
