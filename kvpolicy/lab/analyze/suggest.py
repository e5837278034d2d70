"""A first policy for a model, from what its attention was seen to do; every number is written with its reason."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvpolicy.errors import UsageError
from kvpolicy.lab.analyze.facts import OUTPUT, Facts
from kvpolicy.lab.analyze.summary import Analysis, life_quantile

Array = np.ndarray

MOST = 0.95
"""The share of heads, or of tokens, that a number is enough for; a few heads would have it several times as large."""

ROUND = 16
"""Budgets are multiples of this, for pages and kernels."""

WOKEN = 0.01
"""The share of the prompt's tokens that are woken late, in a head on average, from which on the prompt stays whole:
which ones, nothing tells when the prompt has been read, for a phoenix is silent until then."""

SPARE = 8
"""A cadence may hold one token in so many beyond the budget, and tokens for one part in so many beyond their life."""


@dataclass(frozen=True)
class Derived:
    """The numbers of a suggestion.

    Raises:
        UsageError: the texts say nothing about generated tokens.
    """

    analysis: Analysis

    def __post_init__(self) -> None:
        if not len(self.analysis.lives(OUTPUT)[0]) and not any(self.window + t.prompt < t.length for t in self._texts):
            raise UsageError(
                "a policy is suggested from what happens to generated tokens, and these texts have too few of them; "
                "give texts with longer outputs, or a larger --max-new-tokens"
            )

    @property
    def _texts(self) -> tuple[Facts, ...]:
        return self.analysis.texts

    @property
    def window(self) -> int:
        return self.analysis.rules.local

    @cached_property
    def sinks(self) -> int:
        """The first tokens that are to stay; 0 where fewer than one head in twenty has a sink."""
        last = np.concatenate([text.last_sink.ravel() for text in self._texts])
        return math.ceil(_enough(1 + last)) if (last >= 0).mean() > 1 - MOST else 0

    @cached_property
    def in_use(self) -> int:
        return math.ceil(_enough(np.concatenate([text.in_use.ravel() for text in self._texts])))

    @cached_property
    def with_phoenixes(self) -> int:
        return math.ceil(_enough(np.concatenate([text.with_phoenixes.ravel() for text in self._texts])))

    @cached_property
    def pause(self) -> int:
        """Queries for which a milestone may be passed over before it is looked at again."""
        pauses = np.concatenate([text.pauses.queries for text in self._texts])
        return math.ceil(_enough(pauses)) if len(pauses) else 0

    @cached_property
    def life(self) -> int | None:
        """Half of the milestones are looked at for the last time within so many queries."""
        life, ended = self.analysis.lives()
        return life_quantile(life, ended, 0.5) if len(life) else None

    @property
    def budget(self) -> int:
        return ROUND * math.ceil((self.in_use + max(self.window, self.pause) + ROUND) / ROUND)

    @property
    def every(self) -> int:
        """A power of 2."""
        most = min(self.budget, self.life or self.budget) / SPARE
        return 2 ** max(0, math.floor(math.log2(max(1, most))))

    @property
    def bar(self) -> float:
        """What counts as a look; in a small cache at least twice what each token gets where all get the same."""
        prompt = float(np.mean([text.prompt for text in self._texts]))
        return max(self.analysis.rules.least, round(2 / (prompt + self.budget), 3))

    @cached_property
    def woken(self) -> float:
        return float(np.mean([text.woken.mean() for text in self._texts]))

    @property
    def whole_prompt(self) -> bool:
        return self.woken >= WOKEN or not any(text.prompt > 2 * self.window for text in self._texts)

    @cached_property
    def asked(self) -> float:
        """Share of the prompt at which generated tokens look, rounded up to 5 %."""
        return math.ceil(20 * _enough(np.concatenate([text.asked.ravel() for text in self._texts]))) / 20

    @cached_property
    def lazy_layers(self) -> tuple[int, ...]:
        """Layers without a head that is not lazy, as a policy numbers them."""
        kinds, analysis = self.analysis.head_kinds(), self.analysis
        return tuple(
            analysis.governed.index(layer) for row, layer in zip(kinds, analysis.layers, strict=True) if not row.any()
        )


def suggestion(analysis: Analysis, name: str) -> str:
    """The policy, as YAML. ``name``: how it is to be called; what a name cannot hold is replaced.

    Raises:
        UsageError: the texts say nothing about generated tokens.
    """
    derived = Derived(analysis)
    parts = [_head(derived, name), _params(derived), _prompt_pool(derived), _generated_pool(derived)]
    parts += [_overrides(derived)] if derived.lazy_layers else []
    parts += [_tests(derived)]
    return "\n".join(line for part in parts for line in part) + "\n"


def _enough(values: Array) -> float:
    return float(np.quantile(values, MOST))


def _head(derived: Derived, name: str) -> Iterator[str]:
    analysis = derived.analysis
    texts, rules = analysis.texts, analysis.rules
    prompt, tokens = sum(text.prompt for text in texts), sum(text.length for text in texts)
    read = f"{len(texts)} text{'s' if len(texts) > 1 else ''} ({prompt:,} prompt tokens, {tokens - prompt:,} more)"
    yield from _comment(
        f"Derived from what {analysis.model} looked at in {read}, by `kvpolicy analyze --suggest` with --window "
        f"{rules.local} --silence {rules.silence}. A start, not a result: it says what these texts needed, and nothing "
        "about answers. Compare it with the full cache, `window` and `random` at the same budget before it is used."
    )
    yield "kvpolicy: 1"
    yield f"name: {re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.') or 'suggested'}"
    kept = "Keep the prompt" if derived.whole_prompt else "Keep a share of the prompt"
    yield f"summary: {kept}; of generated tokens, drop the one that was looked at least recently."


def _params(derived: Derived) -> Iterator[str]:
    rules = derived.analysis.rules
    yield ""
    yield "params:"
    extra = derived.with_phoenixes - derived.in_use
    phoenixes = (
        f" Phoenixes among generated tokens would take {extra:,} more; they are not paid for." if extra > 0 else ""
    )
    yield from _comment(
        f"In {MOST:.0%} of the KV heads, at most {derived.in_use:,} generated tokens past their window were in use at "
        f"once (milestones and heavy hitters), and {MOST:.0%} of the milestones were passed over by at most "
        f"{derived.pause:,} queries between two looks, while newer tokens rank above them; with {ROUND} to spare, in "
        f"multiples of {ROUND}.{phoenixes}",
        2,
    )
    yield f"  budget: {{default: {derived.budget}, help: generated tokens kept}}"
    yield from _comment("The queries to which a token counted as new.", 2)
    yield f"  window: {{default: {derived.window}, help: newest tokens that stay}}"
    half = f"half of the milestones live {derived.life:,} queries or less, and " if derived.life else ""
    yield from _comment(
        f"Cadence: {half}the largest power of 2 that is at most 1/{SPARE} of that and of the budget.", 2
    )
    yield f"  every:  {{default: {derived.every}, help: generated tokens between two updates}}"
    yield from _comment(
        f"What counted as a look, {rules.least}, but no less than twice an even share of a prompt like these and a "
        "full budget.",
        2,
    )
    yield f"  bar:    {{default: {derived.bar}, help: attention from which on a token was looked at}}"
    if not derived.whole_prompt:
        yield from _comment(
            f"Generated tokens looked at no more than this share of the prompt in {MOST:.0%} of the KV heads.", 2
        )
        yield f"  share:  {{default: {derived.asked:.0%}, help: share of the prompt that stays}}"


def _prompt_pool(derived: Derived) -> Iterator[str]:
    yield ""
    yield "pools:"
    yield "  prompt:"
    lies = f"; the sinks, its first {derived.sinks}, are among it" if derived.sinks else ""
    if derived.whole_prompt:
        why = (
            f"Generated tokens woke {derived.woken:.1%} of the prompt's tokens, in a KV head on average, after "
            f"{derived.analysis.rules.silence} silent queries or more ({WOKEN:.0%} is the bar), and nothing tells "
            "beforehand which"
            if derived.woken >= WOKEN
            else f"These prompts are no longer than two windows of {derived.window}"
        )
        yield from _comment(f"{why}: so all of it stays{lies}.", 4)
        yield "    admit: prompt"
        return
    yield from _comment(
        f"Generated tokens woke {derived.woken:.1%} of the prompt's tokens only, in a KV head on average, after "
        f"{derived.analysis.rules.silence} silent queries or more: so what its own end looks at will do.",
        4,
    )
    yield "    admit: prompt"
    yield "    budget: max(2 * window, share * prompt_len)"
    if derived.sinks:
        yield from _comment(f"Sinks lay among the first {derived.sinks} tokens.", 4)
        yield f"    pinned: {{first: {derived.sinks}}}"
    yield "    window: window"
    yield "    scorer: {signal: attention, queries: {last: window}}"
    yield "    update: prompt-end"


def _generated_pool(derived: Derived) -> Iterator[str]:
    life, ended = derived.analysis.lives(OUTPUT)
    yield "  generated:"
    if len(life):
        yield from _comment(
            f"{int(ended.sum()):,} of {len(life):,} milestones among generated tokens were never looked at again "
            "before the text ended: the time of the last look is what ranks them.",
            4,
        )
    yield "    admit: generated"
    yield "    budget: budget"
    yield "    window: window"
    yield "    scorer: {signal: attention, heads: max, hit: {above: bar}, memory: last-hit}"
    yield "    update: {every: every}"


def _overrides(derived: Derived) -> Iterator[str]:
    rules = derived.analysis.rules
    listed = ", ".join(map(str, derived.lazy_layers))
    yield ""
    yield "overrides:"
    yield from _comment(
        f"All heads of these layers are lazy: {rules.quiet:.0%} of their attention or more goes to sinks and to tokens "
        "that are new.",
        2,
    )
    yield f"  - layers: [{listed}]"
    yield '    pools: {generated: {budget: "min(budget, 2 * window)"}}'


def _tests(derived: Derived) -> Iterator[str]:
    """One claim, at a small size, in as many layers as ``overrides`` name."""
    layers = 1 + max((1, *derived.lazy_layers))
    yield ""
    yield "tests:"
    yield "  - name: a milestone among generated tokens stays while it is looked at, and its neighbours leave"
    yield "    set: {budget: 48, window: 8, every: 1}"
    yield "    attention:"
    yield "      {pattern: milestone, prompt: 24, steps: 120, at: 40, until: 120, level: 7, noise: 0, heads: 1,"
    yield f"      kv_heads: 1, layers: {layers}}}"
    yield "    expect:"
    yield "      - {keeps: 40, until: 120}"
    yield "      - {evicts: 38, by: 120}"


def _comment(text: str, indent: int = 0) -> Iterator[str]:
    lead = " " * indent + "# "
    yield from textwrap.wrap(text, 120, initial_indent=lead, subsequent_indent=lead)
