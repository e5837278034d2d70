"""The patterns: each tells a scene who is looked at, when, and how much.

``level`` is by how much the logit of a wanted token stands out among its neighbours (4: about 55 times the weight of an
ordinary token) and, negative, how far it falls behind where it is silent. ``fade`` lowers all tokens alike, by up to as
much, the farther back they lie.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvpolicy.language.base import Complaint
from kvpolicy.testing.arguments import Tokens
from kvpolicy.testing.patterns.scene import Scene
from kvpolicy.testing.tokens import spelled

PATTERNS: dict[str, Callable[..., None]] = {}
"""Name in YAML -> function (scene, arguments)."""


EXAMPLES: dict[str, str] = {}
"""Name -> arguments, as in YAML, that show what it is in a text of 8 prompt tokens and 24 generated ones."""


def pattern(example: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a pattern known: its name, its arguments and their kinds are read off the function."""

    def known(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.replace("_", "-")
        PATTERNS[name], EXAMPLES[name] = function, example
        return function

    return known


@pattern()
def uniform(scene: Scene, fade: float = 0.0) -> None:
    """All tokens alike."""
    scene.fade(fade)


@pattern()
def sink(scene: Scene, sinks: int = 4, level: float = 5.0, fade: float = 1.0) -> None:
    """The first tokens soak up most of the attention, of every query."""
    scene.look(range(min(sinks, scene.length)), level)
    scene.fade(fade)


@pattern("width: 3")
def local(scene: Scene, width: float = 8.0) -> None:
    """The newest tokens, in a bell of standard deviation ``width`` tokens."""
    if width <= 0:
        raise Complaint("a width is above 0", "as in `width: 8`", ("width",))
    scene.fade(2 * (scene.length / (np.pi * width)) ** 2)


@pattern("at: [3, 11]")
def heavy_hitter(scene: Scene, at: Tokens, level: float = 4.0, fade: float = 1.0) -> None:
    """Tokens that every query looks at, from the first to the last."""
    scene.look(at, level)
    scene.fade(fade)


@pattern("at: 9, until: 20")
def milestone(scene: Scene, at: Tokens, until: int, level: float = 4.0, fade: float = 1.0) -> None:
    """Tokens that all queries up to position ``until`` look at, and none after."""
    if until < at[-1]:
        raise Complaint(f"at {until} the milestone {spelled(at)} has not been said", "`until` is later", ("until",))
    scene.look(at, np.where(scene.now <= until, level, -level))
    scene.fade(fade)


@pattern("at: 2, from: 20")
def phoenix(scene: Scene, at: Tokens, from_: int, level: float = 4.0, fade: float = 1.0) -> None:
    """Tokens that no query looks at before position ``from``, and all from then on."""
    if from_ <= at[0]:
        raise Complaint(f"{spelled(at)} is no phoenix if it is wanted at {from_}", "`from` is later", ("from",))
    scene.look(at, np.where(scene.now >= from_, level, -level))
    scene.fade(fade)


@pattern("at: 5, every: 6, width: 1")
def burst(
    scene: Scene,
    at: Tokens,
    times: Tokens | None = None,
    every: int | None = None,
    width: int = 2,
    level: float = 4.0,
    fade: float = 1.0,
) -> None:
    """Tokens that are silent but for bursts: ``width`` queries in a row look at them, beginning at the positions
    ``times``, or ``every`` so many tokens after the last of them was said (a quarter of the text that is left).
    """
    if times is not None and every is not None:
        raise Complaint("`times` and `every` both say when", "drop one", ("every",))
    if width < 1:
        raise Complaint("a burst lasts a query at least", "as in `width: 2`", ("width",))
    said = at[-1]
    stride = max(width + 1, (scene.length - said) // 4) if every is None else every
    if times is not None and times[0] <= said:
        raise Complaint(f"at {times[0]}, {spelled(at)} has not been said", f"`times` are above {said}", ("times",))
    if times is None and stride <= width:
        raise Complaint(f"a burst of {width} every {stride} is never silent", "`every` is above `width`", ("every",))
    starts = np.array(range(said + stride, scene.length, stride) if times is None else times, dtype=int)
    since = np.subtract.outer(scene.now, starts)
    scene.look(at, np.where(((since >= 0) & (since < width)).any(axis=1), level, -level))
    scene.fade(fade)


@pattern("at: 3..4, question: 3, answer: 6")
def needle(scene: Scene, at: Tokens, question: int = 4, answer: int = 8, level: float = 6.0, fade: float = 1.0) -> None:
    """Tokens that only the question, the prompt's last tokens, and the answer, the first generated ones, look at."""
    asked = (scene.now >= scene.prompt - question) & (scene.now < scene.prompt + answer)
    scene.look(at, np.where(asked, level, 0.0))
    scene.fade(fade)


@pattern("every: 8, width: 3")
def drift(scene: Scene, every: int = 20, width: int = 4, level: float = 4.0, fade: float = 1.0) -> None:
    """The important region moves: a new one of ``width`` tokens begins at 0, ``every``, 2 * ``every``, …, and is what
    all queries look at until the next begins; earlier regions fall behind.
    """
    if not 0 < width <= every:
        raise Complaint(f"a region of {width} tokens does not fit into {every}", "`width` is 1..`every`", ("width",))
    for start in range(0, scene.length, every):
        current = scene.now // every == start // every
        scene.look(range(start, min(start + width, scene.length)), np.where(current, level, -level))
    scene.fade(fade)


@pattern("at: [3, 11]")
def short_keys(scene: Scene, at: Tokens, spread: float = 5.0, fade: float = 0.0) -> None:
    """Keys of many lengths, which no query notices: some tokens' are 1 to 2 long, all others' 3 to 3 + ``spread``."""
    if spread <= 0:
        raise Complaint("lengths that differ need a spread above 0", "as in `spread: 5`", ("spread",))
    scene.shorten(at, spread)
    scene.fade(fade)


@pattern()
def ties(scene: Scene, kinds: int = 3) -> None:
    """Tokens of a few kinds that queries want by whole numbers: scores tie all the time, in float32 as in float64."""
    if kinds < 1:
        raise Complaint("tokens are of at least one kind", "as in `kinds: 3`", ("kinds",))
    scene.hush()
    kind = scene.random.integers(kinds, size=scene.length)
    for number in range(kinds):
        wanted = scene.random.integers(-1, 2, size=scene.length)
        scene.look(tuple(np.flatnonzero(kind == number)), wanted)
