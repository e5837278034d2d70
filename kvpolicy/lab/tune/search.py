"""A search from beginning to end: draw, play on recorded attention, run the best few on the model, choose."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpolicy.errors import KvpolicyError, ModelError, UsageError
from kvpolicy.lab.analyze.reading import check_length
from kvpolicy.lab.compare.running import versions
from kvpolicy.lab.fidelity.full_cache import Forced, Head
from kvpolicy.lab.recording import layers_of
from kvpolicy.lab.tune.candidates import Candidate, Drawer, levels
from kvpolicy.lab.tune.goal import Goal, Tried, front, rank_correlation, to_measure
from kvpolicy.lab.tune.measured import Bench
from kvpolicy.lab.tune.sizing import Lengths, Settings, Sizer
from kvpolicy.lab.tune.space import Space, space
from kvpolicy.lab.tune.traced import Traced, kept, record_text, spread
from kvpolicy.language import Policy
from kvpolicy.plan import ModelGeometry

Tell = Callable[[int, int, str], None]
"""(done, of how many, what runs now)."""

LEVELS = 8
"""Memories between the least and that of the full cache, where an agreement is asked for."""

ELSEWHERE = 4
"""One trial in so many takes less memory than it might."""

PARENTS = 4
"""The second half of the trials lies near the best of the first: one in so many of them."""

ROUNDS = 3
"""In which the trials are used that are kept for where an agreement is decided."""

PLAYING, RUNNING = "recorded attention", "the model"
"""The two stages."""


class NotReached(KvpolicyError):
    """No candidate is what was asked for: a check that failed, and no mistake of the user's."""


@dataclass(frozen=True)
class Options:
    """How hard to look.

    trials: settings that are tried on recorded attention. runs: those that the model runs. layers: of the model, to
    record; none: ``some_layers`` of those that a policy governs. played: generated tokens of all recorded texts
    together. texts: at most so many are recorded. batch: texts that the model runs at once.
    """

    trials: int = 48
    runs: int = 8
    seed: int = 0
    layers: tuple[int, ...] = ()
    some_layers: int = 3
    played: int = 256
    texts: int = 4
    batch: int = 8
    generic: bool = False


@dataclass
class Tuning:
    """What a search found. ``full``: bytes of the full cache; ``recorded``: layers that were; ``unrecorded``: why none
    was. ``seconds``: by stage."""

    model: str
    device: str
    dtype: str
    policy: Policy
    goal: Goal
    options: Options
    space: Space
    lengths: Lengths
    texts: tuple[tuple[str, int, int], ...]
    full: int
    recorded: tuple[int, ...] = ()
    played: int = 0
    unrecorded: str = ""
    tried: list[Tried] = field(default_factory=list)
    chosen: Tried | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def measured(self) -> list[Tried]:
        """What the model has run, by memory."""
        return sorted((each for each in self.tried if each.measured is not None), key=lambda each: each.bytes)

    @property
    def front(self) -> list[Tried]:
        return front(self.measured)

    def correlation(self, what: str) -> float | None:
        """How well the order on recorded attention told that on the model, -1 to 1. what: "agreement" or "kl"."""
        known = [each for each in self.measured if each.kept is not None]
        signs = {"agreement": -1, "kl": 1}
        on_model = [signs[what] * getattr(each.found, what).value for each in known]
        return rank_correlation([each.promise for each in known], on_model)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


def tune(
    model: Any,
    tokenizer: Any,
    name: str,
    policy: Policy,
    texts: Sequence[tuple[str, Forced]],
    goal: Goal,
    options: Options,
    *,
    given: Settings | None = None,
    only: Collection[str] = (),
    tell: Tell = lambda done, total, what: None,
) -> Tuning:
    """Search the params of a policy for a goal; nothing is chosen where nothing that ran is what was asked for (see
    ``not_reached``). The model is as before afterwards.

    Args:
        name: what the model is called in the report.
        texts: what they are called, and their ids.
        given, only: see ``space``.

    Raises:
        UsageError: there is nothing to search, or no setting fits into the memory that was asked for.
        ModelError: the texts are too long for the model, or no policy can run on it.
    """
    forced = [text for _, text in texts]
    lengths = Lengths(
        (min(len(text.prompt) for text in forced), max(len(text.prompt) for text in forced)),
        max(len(text.output) for text in forced),
    )
    check_length(model, lengths.whole)
    Head(model).check(model, forced[0].ids)
    dtype = str(model.dtype).removeprefix("torch.")
    sizer = Sizer(policy, ModelGeometry.from_config(model.config, dtype), lengths)
    tell(0, options.trials, "which values params may take")
    found = space(sizer, given or {}, only)
    told = tuple((title, len(text.prompt), len(text.output)) for title, text in texts)
    run = Tuning(name, str(model.device), dtype, policy, goal, options, found, lengths, told, sizer.full)
    with run.timed("recording"):
        played = _recorded(run, model, tokenizer, forced, tell)
    with run.timed("drawing"):
        trials = _Trials(run, Drawer(found, sizer, options.seed), played, tell)
        first = trials.begin()
    run.seconds["drawing"] -= run.seconds.get(PLAYING, 0.0)
    _measure(run, Bench(model, tokenizer, forced, options.batch, options.generic), first, trials, tell)
    run.chosen = goal.chosen(run.measured)
    return run


def _recorded(run: Tuning, model: Any, tokenizer: Any, texts: Sequence[Forced], tell: Tell) -> list[Traced]:
    """Traces of some of the texts, in a folder that is gone afterwards: what is needed of them is in memory."""
    options = run.options
    try:
        governed = layers_of(model, ())
        run.recorded = layers_of(model, options.layers) if options.layers else spread(governed, options.some_layers)
    except ModelError as refusal:
        if options.layers:
            raise
        run.unrecorded = str(refusal)
        return []
    special = set(getattr(tokenizer, "all_special_ids", ()))
    chosen = [text for text in texts if len(text.output) > 1][: options.texts]
    steps = max(1, options.played // max(1, len(chosen)))
    found = []
    with tempfile.TemporaryDirectory(prefix="kvpolicy-tune-") as folder:
        for number, text in enumerate(chosen):
            tell(0, options.trials, f"recording text {number + 1} of {len(chosen)}")
            path = Path(folder) / f"{number}.safetensors"
            record_text(model, tokenizer, run.model, text, path, run.recorded)
            marks = [place for place, token in enumerate(text.prompt.tolist()) if token in special]
            found.append(Traced.of(path, governed, steps, marks))
    run.played = sum(text.said.steps for text in found)
    return found


@dataclass
class _Trials:
    """Draws candidates and plays them on recorded attention, as long as trials are left."""

    run: Tuning
    drawer: Drawer
    played: Sequence[Traced]
    tell: Tell

    def add(self, candidate: Candidate | None) -> Tried | None:
        """None where there is no candidate."""
        if candidate is None:
            return None
        tried = Tried(candidate)
        self.run.tried.append(tried)
        if self.played:
            self.tell(len(self.run.tried), self.run.options.trials, "recorded attention")
            with self.run.timed(PLAYING):
                tried.kept = kept(candidate.policy, self.played, self.run.lengths)
        return tried

    def begin(self) -> list[Tried]:
        """All trials within a memory; of those for an agreement the first half, the other is for where it is decided.

        Returns:
            Those that the model should run in any case.

        Raises:
            UsageError: nothing fits.
        """
        run, memory = self.run, self.run.goal.memory
        targets, least = _targets(run, self.drawer)
        first = [self.add(self.drawer.proportions(target)) for target in targets]
        own = self.drawer.sizer(run.space.given)
        if own is not None and (memory is None or own.bytes <= memory):
            first.append(self.add(self.drawer.as_it_is()))
        trials = run.options.trials if memory is not None else max(len(run.tried), run.options.trials // 2)
        for trial in range(len(run.tried), trials):
            target = targets[trial % len(targets)]
            if memory is not None and trial % ELSEWHERE == 0:
                target = round(least * (target / least) ** self.drawer.rng.random())
            near = _parents(run.tried, target) if trial >= trials / 2 and self.played else ()
            self.add(self.drawer.drawn(target, near))
        if not run.tried:
            raise _too_small(run, self.drawer)
        return [each for each in first if each is not None]

    def more(self, target: int) -> list[Tried]:
        """Some of at most ``target`` bytes, near those that were best about there."""
        trials = self.run.options.trials
        count = min(trials - len(self.run.tried), max(2, trials // (2 * ROUNDS)))
        near = [each for each in self.run.tried if target / 2 <= each.bytes <= 2 * target]
        parents = [each.candidate for each in sorted(near, key=lambda each: each.promise)[:PARENTS]]
        found = [self.add(self.drawer.drawn(target, parents)) for _ in range(count)]
        return [each for each in found if each is not None]


def _targets(run: Tuning, drawer: Drawer) -> tuple[list[int], int]:
    """Memories to come to, and the least."""
    least = drawer.least().bytes
    if run.goal.memory is not None:
        return [run.goal.memory], min(least, run.goal.memory)
    most = max(drawer.most(), least)
    return list(dict.fromkeys(levels(least, most, LEVELS))), least


def _parents(tried: Sequence[Tried], target: int) -> list[Candidate]:
    """The best so far of those that take about as much memory, or of all where these are few."""
    near = [each for each in tried if 0.8 * target <= each.bytes <= target]
    pool = near if len(near) >= PARENTS else [each for each in tried if each.bytes <= target]
    best = sorted(pool, key=lambda each: (each.promise, each.candidate.number))
    return [each.candidate for each in best[: max(1, len(best) // PARENTS)]]


def _too_small(run: Tuning, drawer: Drawer) -> UsageError:
    least = drawer.least()
    said = " ".join(f"{name}={value}" for name, value in least.settings.items()) or "its defaults"
    return UsageError(
        f"no setting of {run.policy.name} fits into {run.goal.memory:,} bytes with a prompt of "
        f"{run.lengths.prompt[1]:,} tokens and {run.lengths.new_tokens:,} new ones: the least that was found takes "
        f"{least.bytes:,} bytes ({said}); allow that much, or take shorter texts or another policy"
    )


def _measure(run: Tuning, bench: Bench, first: Sequence[Tried], trials: _Trials, tell: Tell) -> None:
    runs, places = run.options.runs, sum(len(text.output) for text in bench.texts)
    for number, tried in enumerate(to_measure(run.goal, run.tried, first, runs, run.options.seed, trials.more)):

        def step(tokens: int, seconds: float, number: int = number) -> None:
            tell(number, runs, f"the model: {tokens:,} of {places:,} tokens")

        step(0, 0.0)
        with run.timed(RUNNING):
            found = bench.measure(tried.candidate.policy, step)
        if isinstance(found, str):
            tried.refused = found
        else:
            tried.measured = found
    tell(runs, runs, "done")


def not_reached(run: Tuning) -> KvpolicyError:
    """Why nothing was chosen."""
    if not run.measured:
        reason = next((each.refused for each in run.tried if each.refused), "nothing ran")
        return UsageError(f"{run.policy.name} cannot run on {run.model} with any of the settings tried: {reason}")
    best = run.front[-1]
    said = " ".join(f"{name}={value}" for name, value in best.candidate.settings.items())
    return NotReached(
        f"no setting of {run.policy.name} that was measured agrees with the full cache at {run.goal.agreement:.2%} of "
        f"the places: the best reached {best.found.agreement.value:.2%} in {best.bytes:,} bytes ({said}); ask for "
        "less, or try more with --trials and --runs"
    )
