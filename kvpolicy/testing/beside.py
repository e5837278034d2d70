"""Run the runtime and the oracle side by side: the same queries, keys and values through both, compared each pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.attention import Formula, Rotation, turn
from kvpolicy.oracle import Memories, Rotate, Step
from kvpolicy.plan import Plan
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.chunks import Chunk
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.scorers.memory import CLOCKED
from kvpolicy.testing.agreement import Agreement

Run = Callable[[PolicyLayer, Tensor, Tensor, Tensor, Formula], Tensor]


def run_layer(layer: PolicyLayer, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
    """A layer's pass, uncompiled."""
    return layer.forward(query, key, value, formula)


class Beside:
    """A runtime cache and an oracle of one plan, fed together.

    ``generated`` runs a layer's generated passes (hand in a compiled ``run_layer`` to check that instead); ``device``
    and ``backend`` are the cache's. Where positions are compact, queries and keys are fed without a rotation, and the
    runtime gets them with this ``rotation``, as a model would rotate them; by default they carry none.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        generated: Run = run_layer,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        rotation: Rotation | None = None,
    ) -> None:
        self.plan = plan
        self.cache = PolicyCache(plan, device=device, backend=backend, rotation=rotation or Rotation.none())
        self.rotation = self.cache.rotation or Rotation.none()
        for part in self.cache.parts():
            part.shows_reading = True
        self.agreement = Agreement(plan, rows=plan.batch, rotate=rotate_of(plan, self.rotation))
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
        formula = Formula(scaling or self.plan.geometry.head_dim**-0.5)
        flags = {"valid": valid, "special": special, "modality": modality}
        rotated = [self._rotated(*given, valid) for given in tensors]
        opened = self.cache.begin(tensors[0][0].shape[2], **flags, kind=kind, more=more or None)
        run = run_layer if opened == "prompt" else self.generated
        outputs = [run(layer, *given, formula) for layer, given in zip(self.cache.governed, rotated, strict=True)]
        self.cache.finish()
        steps = []
        for number, given in enumerate(tensors):
            heard = Heard(*given, outputs[number], **{name: flag for name, flag in flags.items() if flag is not None})
            steps += check_pass(self.agreement, self.cache, number, heard, opened, more=more, formula=formula)
        return steps

    def _rotated(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer is given: queries and keys at their positions."""
        place = self.cache.coming(key.shape[2], valid)[:, None]
        frequencies = torch.tensor(self.rotation.frequencies, device=key.device)
        query, key = (turn(vectors, torch.zeros_like(place), place, frequencies) for vectors in (query, key))
        return query, key, value


def rotate_of(plan: Plan, rotation: Rotation) -> Rotate | None:
    """How the oracle of a plan rotates; None where positions are absolute."""
    if plan.policy.positions != "compact":
        return None

    def rotate(vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        place = torch.from_numpy(np.asarray(positions))
        frequencies = torch.tensor(rotation.frequencies)
        return turn(torch.from_numpy(vectors), torch.zeros_like(place), place, frequencies).numpy()

    return rotate


@dataclass(frozen=True)
class Heard:
    """What a layer was given in a pass, and its ``output`` [B, N, Q, D]; flags [B, N] as ``begin`` takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    valid: Tensor | None = None
    special: Tensor | None = None
    modality: Tensor | None = None

    def part(self, chunk: Chunk) -> Heard:
        """The part that is a chunk of the prompt."""
        return Heard(
            query=chunk.of(self.query),
            key=chunk.of(self.key),
            value=chunk.of(self.value),
            output=chunk.of(self.output.transpose(1, 2)).transpose(1, 2),
            valid=chunk.valid,
            special=None if self.special is None else self.special.gather(1, chunk.columns),
            modality=None if self.modality is None else self.modality.gather(1, chunk.columns),
        )


def check_pass(
    agreement: Agreement,
    cache: PolicyCache,
    number: int,
    heard: Heard,
    opened: str,
    *,
    more: bool = False,
    formula: Formula,
) -> list[Step]:
    """Compare what a layer did in the pass that was just closed; what the cache took in chunks goes so to the oracle.

    Returns every row after the pass. Raises Disagreement.
    """
    chunks = cache.moment.chunks if opened == "prompt" else ()
    parts = [heard.part(chunk) for chunk in chunks] or [heard]
    steps: list[Step] = []
    for count, now in enumerate(parts, 1):
        last = count == len(parts)
        settled = last and (bool(chunks) or not more)
        positions = cache.positions(number) if settled else None
        if chunks and not settled:
            positions = cache.governed[number].positions(count - 1)
        modality = now.modality
        steps = agreement.check(
            number,
            now.query,
            now.key,
            now.value,
            positions,
            valid=now.valid,
            kind="prompt" if opened == "prompt" else "generated",
            more=more or not last,
            scaling=formula.scaling,
            softcap=formula.softcap,
            sinks=formula.sinks,
            special=now.special,
            modality=None if modality is None else [["image" if at == 1 else None for at in row] for row in modality],
            output=now.output,
            memory=memories(cache, number) if settled else None,
            read=readings(cache, number) if opened != "prompt" else None,
        )
    return steps


def memories(cache: PolicyCache, layer_idx: int) -> list[Memories]:
    """What a layer's units remember, by row: (KV head, pool, leaf) -> {position of the unit: value}."""
    rows: list[dict[tuple[int, str, int], dict[int, Any]]] = [{} for _ in range(cache.plan.batch)]
    for part in cache.governed[layer_idx].parts:
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
    parts = cache.governed[layer_idx].parts
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
