"""An analysis as one HTML file that needs nothing beside it, and no JavaScript."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from kvpolicy.lab.analyze.facts import OUTPUT, PARTS, PROMPT
from kvpolicy.lab.analyze.rules import JUDGED
from kvpolicy.lab.analyze.summary import HEAD_KINDS, Analysis, survival
from kvpolicy.lab.drawing import LOW, WIDE, svg
from kvpolicy.lab.palette import CLASSES
from kvpolicy.lab.web_page import document, key, tick

Array = np.ndarray

STYLE = """section { display: block; grid-row: auto; }
.plot { cursor: default; }
.plot rect { stroke: none; }
.curve { fill: none; stroke-width: 2.5; }
td { white-space: nowrap; }
.wide { overflow-x: auto; }
"""

HIGH = 640
"""Units of the height of a drawing of many layers."""

BINS = 24


def page(analysis: Analysis) -> str:
    """The page; the model's and the texts' names are escaped."""
    title = f"What {analysis.model} attends to"
    read = ", ".join(f"{text.name} ({text.prompt:,} + {text.length - text.prompt:,} tokens)" for text in analysis.texts)
    header = f"""<h1>{escape(title)}</h1>
<p>Read: {escape(read)}.</p>
<p class="faint">A token is new to the {analysis.rules.local} queries from its own on. Milestones are looked at later,
for a while; phoenixes after at least {analysis.rules.silence} queries in a row did not; heavy hitters by most.</p>
<ul class="legend">
{"".join(_legend())}</ul>"""
    main = f"""<section>{_heads(analysis)}</section>
<section>{_layers(analysis)}{_table(analysis)}</section>
<section>{_lives(analysis)}{_silences(analysis)}</section>"""
    return document(title, header, main, style=STYLE)


def _legend() -> Iterator[str]:
    words = {
        "sink": "sink",
        "window": "new; of tokens: local",
        "heavy-hitter": "heavy hitter",
        "milestone": "milestone",
        "phoenix": "phoenix",
        "rest": "other tokens; of tokens: lazy",
    }
    for name in PARTS:
        yield key(f'<rect width="48" height="30" fill="{CLASSES[name]}"/>', words[name])


def _heads(analysis: Analysis) -> str:
    """Every head as a box, filled by where its attention goes."""
    attention, kinds = analysis.attention(), analysis.head_kinds()
    layers, heads = kinds.shape
    wide, row, boxes = WIDE / heads, _row(layers), []
    for layer, head in np.ndindex(layers, heads):
        said = ", ".join(f"{name} {share:.0%}" for name, share in zip(PARTS, attention[layer, head], strict=True))
        name = f"layer {analysis.layers[layer]}, head {head}: {HEAD_KINDS[kinds[layer, head]]}; {said}"
        filled = _bar(attention[layer, head], head * wide + 2, wide - 4, layer * row + 2, row - 4)
        boxes.append(f"<g><title>{escape(name)}</title>{filled}</g>")
    drawn = svg("Where the attention of every head goes: layers from top to bottom, heads from left to right",
                round(layers * row), "".join(boxes))  # fmt: skip
    marks = [tick("left", (head + 0.5) / heads, f"head {head}") for head in (0, heads - 1)]
    return _chart("Where each head’s attention goes: a box is a head", drawn, _layer_ticks(analysis), marks)


def _row(layers: int) -> float:
    """Units of a layer's height."""
    return min(70.0, max(22.0, HIGH / layers))


def _layers(analysis: Analysis) -> str:
    """Every layer as a bar: the classes of its tokens."""
    shares = analysis.layer_shares().value
    row, names = _row(len(shares)), [kind.word for kind in JUDGED]
    bars = "".join(_bar(layer, 0, WIDE, at * row + 2, row - 4, names) for at, layer in enumerate(shares))
    drawn = svg("Shares of each layer's tokens by class", round(len(shares) * row), bars)
    marks = [tick("left", share, f"{share:.0%}") for share in (0, 0.5, 1)]
    return _chart("Tokens by class, in each layer", drawn, _layer_ticks(analysis), marks)


def _bar(shares: Array, left: float, wide: float, top: float, high: float, names: Sequence[str] = PARTS) -> str:
    """Shares side by side, in the order of their names."""
    parts = []
    for name, share in zip(names, shares, strict=True):
        if share * wide >= 0.3:
            place = f'x="{left:.1f}" y="{top:g}" width="{share * wide:.1f}" height="{high:g}"'
            parts.append(f'<rect {place} fill="{CLASSES[name]}"/>')
        left += share * wide
    return "".join(parts)


def _layer_ticks(analysis: Analysis) -> list[str]:
    count = len(analysis.layers)
    shown = sorted({round(number) for number in np.linspace(0, count - 1, min(count, 6))})
    return [f'<span style="top:{100 * (index + 0.5) / count:.1f}%">{analysis.layers[index]}</span>' for index in shown]


def _lives(analysis: Analysis) -> str:
    """How many milestones live longer than so many queries."""
    most = max((int(analysis.lives(part)[0].max(initial=1)) for part in (PROMPT, OUTPUT)), default=1)
    curves, told = [], []
    for part, name, dash in ((PROMPT, "prompt", "7 4"), (OUTPUT, "output", "none")):
        life, ended = analysis.lives(part)
        told.append(f"{len(life):,} in the {name}")
        if len(life):
            times, lasting = survival(life, ended)
            points, level = f"M0 {_height(1.0):.1f}", 1.0
            for at, share in zip(times.tolist(), lasting.tolist(), strict=True):
                if share != level:
                    points += f"H{WIDE * at / most:.1f}V{_height(share):.1f}"
                    level = share
            stroke = f'stroke="{CLASSES["milestone"]}" stroke-dasharray="{dash}"'
            curves.append(f'<path class="curve" {stroke} d="{points}H{WIDE * times[-1] / most:.1f}"/>')
    lines = "".join(
        f'<line class="grid" x1="0" x2="{WIDE}" y1="{y}" y2="{y}"/>' for y in (LOW / 4, LOW / 2, LOW * 0.75)
    )
    drawn = svg("Share of milestones that live longer than so many queries", LOW, lines + "".join(curves))
    y = [tick("top", share, f"{1 - share:.0%}") for share in (0, 0.5, 1)]
    x = [tick("left", share, f"{round(share * most):,}") for share in (0, 0.5, 1)]
    caption = f"Milestones that live longer than so many queries ({', '.join(told)}; dashed: prompt)"
    return _chart(caption, drawn, y, x)


def _height(share: float) -> float:
    return 1 + (LOW - 2) * (1 - share)


def _silences(analysis: Analysis) -> str:
    """How long phoenixes were silent: in the prompt below, in the output above."""
    parts = [analysis.silences(part) for part in (PROMPT, OUTPUT)]
    least, most = analysis.rules.silence, max((int(part.max(initial=0)) for part in parts), default=0)
    edges = np.linspace(least, max(most, least + 1), BINS + 1)
    counts = np.stack([np.histogram(part, edges)[0] for part in parts])
    top, bars = max(1, int(counts.sum(0).max())), []
    for number, (below, above) in enumerate(counts.T.tolist()):
        left, wide = WIDE * number / BINS + 1, WIDE / BINS - 2
        for base, count, opacity in ((0, below, 1.0), (below, above, 0.5)):
            high = LOW * count / top
            bars.append(
                f'<rect x="{left:.1f}" y="{LOW * (1 - base / top) - high:.1f}" width="{wide:.1f}" height="{high:.1f}" '
                f'fill="{CLASSES["phoenix"]}" fill-opacity="{opacity}"/>'
            )
    drawn = svg("Phoenixes by the length of their silence", LOW, "".join(bars))
    y = [tick("top", share, f"{round(top * (1 - share)):,}") for share in (0, 0.5, 1)]
    x = [tick("left", share, f"{round(edges[0] + share * (edges[-1] - edges[0])):,}") for share in (0, 0.5, 1)]
    caption = (
        f"Phoenixes by the queries for which they were silent ({len(parts[PROMPT]):,} in the prompt, dark, and "
        f"{len(parts[OUTPUT]):,} in the output, light)"
    )
    return _chart(caption, drawn, y, x)


def _table(analysis: Analysis) -> str:
    shares, prompt = analysis.shares(), analysis.in_prompt()
    inside = [f"{prompt.value[number]:.0%}" if shares.value[number] else "" for number in range(len(JUDGED))]
    rows = "".join(
        f"<tr><td>{kind.word}</td><td>{shares.value[number]:.2%}</td><td>{shares.low[number]:.2%} – "
        f"{shares.high[number]:.2%}</td><td>{inside[number]}</td></tr>"
        for number, kind in enumerate(JUDGED)
    )
    rows += f"<tr><td>all</td><td></td><td></td><td>{analysis.prompt_share():.0%}</td></tr>"
    head = "<tr><th>class</th><th>of tokens</th><th>95 % interval</th><th>in the prompt</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _chart(caption: str, drawn: str, y: Sequence[str], x: Sequence[str]) -> str:
    return f"""<figure>
<figcaption>{escape(caption)}</figcaption>
<div class="chart"><div class="y">{"".join(y)}</div>
<div class="plot">{drawn}</div>
<div class="x">{"".join(x)}</div></div>
</figure>
"""
