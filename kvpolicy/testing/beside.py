"""Run the runtime and the oracle side by side: the same queries, keys and values through both, compared each pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpolicy.oracle import Memories, Step
from kvpolicy.plan import Plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.scorers.memory import CLOCKED
from kvpolicy.testing.agreement import Agreement

Run = Callable[[PolicyLayer, Tensor, Tensor, Tensor, float], Tensor]


def run_layer(layer: PolicyLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """A layer's pass, uncompiled."""
    return layer.forward(query, key, value, scaling)


class Beside:
    """A runtime cache and an oracle of one plan, fed together.

    ``generated`` runs a layer's generated passes (hand in a compiled ``run_layer`` to check that instead); ``device``
    and ``backend`` are the cache's.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        generated: Run = run_layer,
        device: str | torch.device = "cpu",
        backend: str = "auto",
    ) -> None:
        self.plan = plan
        self.cache = PolicyCache(plan, device=device, backend=backend)
        for part in self.cache.parts():
            part.shows_reading = True
        self.agreement = Agreement(plan, rows=plan.batch)
        self.generated = generated

    @torch.no_grad()
    def feed(
        self,
        tensors: list[tuple[Tensor, Tensor, Tensor]],
        valid: Tensor | None = None,
        *,
        kind: str | None = None,
        more: bool = False,
        scaling: float | None = None,
        special: Tensor | None = None,
        modality: Tensor | None = None,
    ) -> list[Step]:
        """One pass of the whole model: (query [B, Q, N, D], key, value [B, K, N, D]) for every layer.

        ``valid``, ``special`` and ``modality`` [B, N] as ``PolicyCache.begin`` takes them.

        Returns every row of every layer after the pass, in the oracle's words.

        Raises:
            Disagreement: the first layer, row and head where the runtime kept, attended or remembered otherwise.
        """
        scaling = scaling or self.plan.geometry.head_dim**-0.5
        flags = {"special": special, "modality": modality}
        opened = self.cache.begin(tensors[0][0].shape[2], valid, kind=kind, more=more or None, **flags)
        images = None if modality is None else [["image" if at == 1 else None for at in row] for row in modality]
        run = run_layer if opened == "prompt" else self.generated
        outputs = [run(layer, *given, scaling) for layer, given in zip(self.cache.layers, tensors, strict=True)]
        self.cache.finish()
        settled, steps = not more, []
        for number, given in enumerate(tensors):
            steps += self.agreement.check(
                number,
                *given,
                self.cache.positions(number) if settled else None,
                valid=valid,
                kind="prompt" if opened == "prompt" else "generated",
                more=more,
                scaling=scaling,
                special=special,
                modality=images,
                output=outputs[number],
                memory=memories(self.cache, number) if settled else None,
                read=readings(self.cache, number) if opened != "prompt" else None,
            )
        return steps


def memories(cache: PolicyCache, layer_idx: int) -> list[Memories]:
    """What a layer's units remember, by row: (KV head, pool, leaf) -> {position of the unit: value}."""
    rows: list[dict[tuple[int, str, int], dict[int, Any]]] = [{} for _ in range(cache.plan.batch)]
    for part in cache.layers[layer_idx].parts:
        state = part.state
        numbers = state.kv_heads[0].tolist()
        for pool in part.plan.pools:
            places = state.unit_position(pool).tolist()
            for leaf in part.policies[pool.name].leaves:
                if leaf.memory == "none":
                    continue
                values = state.by_head(pool, f"memory.{leaf.number}").tolist()
                gap_values = state.by_head(pool, f"gap.{leaf.number}").tolist() if leaf.memory == "recurrence" else None
                for row, heads in enumerate(places):
                    for head, units in enumerate(heads):
                        found = rows[row].setdefault((numbers[head], pool.name, leaf.number), {})
                        for unit, position in enumerate(units):
                            if position >= 0:
                                value = values[row][head][unit]
                                clocked = int(value) if leaf.memory in CLOCKED else value
                                found[position] = (clocked, gap_values[row][head][unit]) if gap_values else clocked
    return list(rows)


def readings(cache: PolicyCache, layer_idx: int) -> list[list[dict[str, frozenset[int]]]] | None:
    """What a layer read in its last generated pass, by row and KV head: pool -> positions; None where it read all."""
    parts = cache.layers[layer_idx].parts
    if not any(part.chosen for part in parts):
        return None
    heads = range(cache.plan.geometry.kv_heads)
    rows: list[list[dict[str, frozenset[int]]]] = [[{} for _ in heads] for _ in range(cache.plan.batch)]
    for part in parts:
        state = part.state
        for name, chosen in part.chosen.items():
            pool = state.pools[name]
            for row, by_head in enumerate(chosen.tolist()):
                for head, units in enumerate(by_head):
                    shown = part.attended[row, head, state.span(pool)].view(pool.units, pool.page)
                    tokens = shown[[unit for unit in units if unit >= 0]].flatten().tolist()
                    rows[row][int(state.kv_heads[0, head])][name] = frozenset(t for t in tokens if t >= 0)
    return rows
