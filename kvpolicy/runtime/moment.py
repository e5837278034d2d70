"""The pass that is open: what the host tells every layer of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.attention import Rotation
from kvpolicy.errors import CacheError
from kvpolicy.plan import Plan
from kvpolicy.runtime.chunks import Chunk
from kvpolicy.runtime.clocks import Clocks, Places

PROMPT, PLAIN, UPDATE, GIVEN = "prompt", "plain", "update", "given"


@dataclass
class Moment:
    """The pass that is open: set by ``PolicyCache.begin``, read by every layer. ``kind`` is None between passes.

    For prompt passes also the tokens' positions [B, N], by stream their numbers within the turn [B, N], which of them
    have the ``traits`` that the policy asks for [B, N], whether more of the turn is to come, whether the cache was
    empty and nothing is padded (``whole``), and whether it is the turn's first pass; and its ``chunks``, where an
    update follows each. For generated passes that are taken at once (``GIVEN``) their kinds, one after the other, as
    ``steps``, in ``before`` where the clocks stood before the first, and the ``compiler`` of their steps, if they are
    compiled. ``shown`` is None where a prompt is read; else the layer is shown one that was read before, nobody wants
    its attention, and what it found out about the same one stands there. ``room`` are tensors that layers use one after
    the other, and whose values mean nothing afterwards.
    ``plan``, ``kinds`` and ``rotation`` do not change from pass to pass: the cache's plan, the kinds of its generated
    passes, and how keys are turned where positions are compact.
    """

    kind: str | None = None
    columns: int = 0
    position: Tensor | None = None
    places: Places = ()
    traits: Mapping[str, Tensor] = field(default_factory=dict)
    more: bool = False
    whole: bool = False
    first: bool = False
    empty: bool = False
    plan: Plan | None = None
    kinds: tuple[str, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    steps: tuple[str, ...] = ()
    before: tuple[Tensor, ...] = ()
    compiler: Any = None
    shown: dict[Hashable, Tensor] | None = None
    room: dict[Any, Tensor] = field(default_factory=dict)
    rotation: Rotation | None = None

    def at(self, number: int) -> Moment:
        """The same for one of its chunks alone, which ends as a turn does."""
        chunk, begins = self.chunks[number], number == 0
        return replace(
            self,
            columns=chunk.valid.shape[1],
            position=chunk.position,
            places=chunk.places,
            traits=chunk.traits,
            more=False,
            whole=self.whole and begins,
            empty=self.empty and begins,
            chunks=(),
        )


@dataclass(frozen=True)
class Site:
    """What the layers on one device read of the time and of the pass that is open."""

    device: torch.device
    clocks: Clocks
    moment: Moment


def opened(moment: Moment) -> str:
    """The kind of the pass that is open.

    Raises:
        CacheError: none is.
    """
    if moment.kind is None:
        raise CacheError(
            "this pass was not opened: the model was called in a way that skips kvpolicy's hooks (a model compiled "
            "as a whole, or a decoder layer called by hand); call cache.begin(columns) before each pass, or let "
            "kvpolicy compile it: kvpolicy.apply(model, policy, compile=True)"
        )
    return moment.kind
