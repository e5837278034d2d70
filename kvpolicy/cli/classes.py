"""What `kvpolicy analyze` prints for a person: tables of classes and layers, and what is worth a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.words import plural

if TYPE_CHECKING:
    from kvpolicy.lab.analyze.summary import Analysis


def show(analysis: Analysis) -> None:
    """The analysis, as two tables and a few lines."""
    output.data("")
    output.table(["class", "of tokens", "95 % interval", "of attention", "in the prompt"], list(_classes(analysis)))
    over = "drawn from these texts anew" if analysis.basis == "texts" else "as if each token were drawn by itself"
    output.data(f"[dim]judged tokens over all layers and heads; intervals {over}[/]\n")
    output.table(["layer", *_columns(), "lazy heads"], list(_layers(analysis)))
    output.data("[dim]shares of the layer's attention[/]\n")
    for name, text in sentences(analysis):
        output.data(f"{name:<11} {escape(text)}")


def _columns() -> list[str]:
    from kvpolicy.lab.analyze.facts import PARTS

    return [{"rest": "other"}.get(part, part) for part in PARTS]


def _classes(analysis: Analysis) -> Iterator[list[str]]:
    from kvpolicy.lab.analyze.facts import PARTS
    from kvpolicy.lab.analyze.rules import JUDGED

    shares, prompt, attention = analysis.shares(), analysis.in_prompt(), analysis.attention().mean((0, 1))
    counts = analysis.counts.sum((0, 1, 2, 3))
    for number, kind in enumerate(JUDGED):
        paid = f"{attention[PARTS.index(kind.word)]:.1%}" if kind.word in PARTS else ""
        yield [
            kind.word,
            f"{shares.value[number]:.2%}",
            f"{shares.low[number]:.2%} – {shares.high[number]:.2%}",
            paid,
            f"{prompt.value[number]:.0%}" if counts[number] else "",
        ]
    yield ["all", "", "", "", f"{analysis.prompt_share():.0%}"]


def _layers(analysis: Analysis) -> Iterator[list[str]]:
    attention, kinds = analysis.attention().mean(1), analysis.head_kinds()
    for index, layer in enumerate(analysis.layers):
        lazy = int((kinds[index] == 0).sum())
        yield [str(layer), *(f"{share:.0%}" for share in attention[index]), f"{lazy} of {kinds.shape[1]}"]


def sentences(analysis: Analysis) -> Iterator[tuple[str, str]]:
    """(what, what is to be said about it)."""
    from kvpolicy.lab.analyze.rules import JUDGED
    from kvpolicy.lab.analyze.summary import HEAD_KINDS, life_quantile

    tokens = sum(text.length for text in analysis.texts)
    prompt = sum(text.prompt for text in analysis.texts)
    several = f"{len(analysis.texts)} texts, " if len(analysis.texts) > 1 else ""
    yield "read", f"{several}{plural(prompt, 'prompt token')}, {tokens - prompt:,} more, in {analysis.seconds:.0f} s"
    kinds = np.bincount(analysis.head_kinds().ravel(), minlength=len(HEAD_KINDS))
    said = ", ".join(f"{count:,} {name}" for name, count in zip(HEAD_KINDS, kinds, strict=True) if count)
    yield "heads", f"of {kinds.sum():,}: {said}"
    life, ended = analysis.lives()
    if len(life):
        marks = {share: life_quantile(life, ended, share) for share in (0.5, 0.9)}
        words = [
            f"{share:.0%} within {'more than was read' if at is None else f'{at:,}'}" for share, at in marks.items()
        ]
        yield "milestones", f"{len(life):,}; looked at for the last time, in queries: {', '.join(words)}"
    silence, woken = analysis.silences(), analysis.woken_late()
    if len(silence):
        half, most = (int(np.quantile(silence, share)) for share in (0.5, 0.9))
        late = f"; generated tokens woke {woken[0]:,} in the prompt and {woken[1]:,} in the output"
        yield "phoenixes", f"{len(silence):,}; silent for {half:,} queries (median), {most:,} (90 %){late}"
    agreement, correlations = analysis.agreement(), analysis.correlations()
    if agreement is not None and correlations is not None:
        told = [
            f"{kind.word} {value:.2f}"
            for kind, value in zip(JUDGED, correlations, strict=True)
            if not np.isnan(value) and kind.word in ("milestone", "phoenix", "lazy")
        ]
        same = f"a head is of the same kind in {agreement[0]:.0%} of pairs of texts ({agreement[1]:.0%} by chance)"
        shares = ", ".join(told) or "they do not differ between heads"
        yield "stability", f"{same}; its shares correlate: {shares}"
