"""A text that works against a policy: what was dropped is what is wanted next.

The policy's own plan runs on the oracle while the text is made. Keys are fixed beforehand, every token's in a direction
of its own; before each generated token is said, its query is turned towards what its KV head has just lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.plan import Plan
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, passes
from kvpolicy.testing.patterns.generators import pattern
from kvpolicy.testing.patterns.scene import Array, Scene

Against = Callable[[Attention], Plan] | None
"""The plan of the policy in question for a text."""


@dataclass
class Adversary:
    """Wants the ``width`` tokens that left last, in the queries ``asked`` [Q, T] bool.

    ``gone`` are those that left so far by KV head, in order of leaving.
    """

    width: int
    level: float
    asked: Array
    gone: dict[int, list[int]] = field(default_factory=dict)

    def hear(self, head: int, said: int, kept: frozenset[int]) -> None:
        """After a pass: which of the ``said`` tokens a KV head keeps."""
        gone = self.gone.setdefault(head, [])
        known = set(gone)
        gone += [token for token in range(said) if token not in kept and token not in known]

    def wants(self, head: int) -> list[int]:
        """Now, of a KV head."""
        return self.gone.get(head, [])[-self.width :]


@pattern("width: 2")
def adversarial(scene: Scene, against: Against, width: int = 4, level: float = 4.0, fade: float = 1.0) -> None:
    """Made against the policy under test: every generated token wants the ``width`` tokens that its KV head dropped
    last, which is the most that this policy can regret. Before it has dropped any, all tokens are alike.
    """
    if against is None:
        raise Complaint("there is no policy to work against here", "use it in the `tests:` of one", ("pattern",))
    if width < 1:
        raise Complaint("an adversary wants a token at least", "as in `width: 4`", ("width",))
    scene.singled = True
    scene.late.append(Adversary(width, level, scene.asked))
    scene.fade(fade)


def provoke(said: Attention, scenes: Sequence[Sequence[Scene]], sees: Sequence[bool], against: Against) -> None:
    """Say a text to a policy and, in place, turn its queries towards what the policy drops.

    Args:
        said: the text as its scenes, [row][layer], were realised.
        sees: which query heads see the pattern [Q].

    Raises:
        Complaint: the policy has no plan for this text, or none of the queries misses anything.
    """
    assert against is not None
    try:
        plan = against(said)
    except Complaint as complaint:
        raise Complaint(complaint.reason, complaint.hint) from None
    feed, group, turned = OracleAlone(plan), said.geometry.group, 0
    for now in passes(said, plan.prompt_chunk):
        for row, span in enumerate(now.rows if now.kind == "generated" else ()):
            for layer, scene in enumerate(scenes[row]):
                turned += _turn(said.queries[row][layer], scene, span.start, group, sees)
        for step in feed.feed(said, now):
            for adversary in scenes[step.row][step.layer].late:
                for head, pools in enumerate(step.heads):
                    kept = frozenset().union(*(pool.kept for pool in pools.values()))
                    adversary.hear(head, step.prompt_len + step.t, kept)
    if not turned:
        hint = "use more `steps`, or a smaller budget under `set`"
        raise Complaint("this policy drops nothing of this text that could be missed", hint, ("pattern",))


def _turn(queries: Array, scene: Scene, position: int, group: int, sees: Sequence[bool]) -> int:
    """Turn one position's queries [Q, T, D] of a scene to what was lost; how many were turned."""
    _, direction = scene.kinds()
    strength, turned = queries.shape[-1] ** 0.5 / scene.part, 0
    for adversary in scene.late:
        for head in np.flatnonzero(adversary.asked[:, position] & np.asarray(sees)):
            wanted = adversary.wants(int(head) // group)
            queries[head, position, direction[wanted]] += np.float32(adversary.level * strength)
            turned += bool(wanted)
    return turned
