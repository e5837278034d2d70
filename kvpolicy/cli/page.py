"""What `kvpolicy explain` prints for a person, as lines of rich markup, wrapped so that they read anywhere."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from rich.markup import escape

from kvpolicy.cli import picture
from kvpolicy.cli.words import costs, plural, pool_answers
from kvpolicy.plan import Plan, gathered
from kvpolicy.plan.timeline import PoolTimeline

if TYPE_CHECKING:
    from kvpolicy.cli.explain import Explained, Group

SHOWN = 3
"""Groups of layers that are shown in full; the others are in the table, and `--layer` shows any of them."""

COLUMNS = 6
"""Steps in the table of residents after t = 0."""


def page(explained: Explained) -> Iterator[str]:
    """The explanation, top to bottom."""
    yield from _title(explained)
    yield from _warnings(explained)
    sections = _sections(explained)
    for alike in sections:
        layers = _layers(sorted(index for group in alike for index in group.indices))
        yield ""
        yield "[bold]Pools[/]" + (f" of {layers}" if len(sections) > 1 else "")
        yield from _pools(alike, explained.plan)
    for group in explained.groups[:SHOWN]:
        yield ""
        yield from _slots(group, explained)
        yield from _residents(group.lines, explained.plan)
    yield from _others(explained)
    yield ""
    yield from _memory(explained.plan)
    yield from _shares(explained)


def _title(explained: Explained) -> Iterator[str]:
    plan, policy = explained.plan, explained.plan.policy
    cite = f"  {', '.join(policy.cite)}" if policy.cite else ""
    yield f"[bold]{escape(policy.name)}[/]{escape(cite)}"
    if policy.summary:
        yield from wrapped(policy.summary, "")
    width = max((len(f"{name} = {param.value.text}") for name, param in policy.params.items()), default=0)
    for name, param in policy.params.items():
        yield from wrapped(param.help, f"  {f'{name} = {param.value.text}':<{width}}  ")
    yield ""
    shape = plan.geometry
    heads = plural(shape.query_heads, "query head")
    yield from wrapped(
        f"Under {explained.model}: {plural(shape.layers, 'layer')}, {heads} on {plural(shape.kv_heads, 'KV head')} of "
        f"size {shape.head_dim}, {shape.dtype}. {plural(plan.batch, 'row')}, {plural(plan.prompt[1], 'prompt token')}, "
        f"{plan.max_new_tokens:,} to generate. Tokens and slots are counted per layer, row and KV head.",
        "",
    )
    if shape.local:
        spans = " or ".join(f"{span:,}" for span in sorted({layer.span for layer in shape.local}))
        yield from wrapped(
            f"{plural(len(shape.local), 'more layer')} attend to the last {spans} tokens only. The policy does not "
            "touch them, and numbers its layers without them.",
            "",
        )


def _warnings(explained: Explained) -> Iterator[str]:
    refusals = explained.refusals
    if refusals:
        text = f"CANNOT RUN YET: {'; '.join(refusals)}. The numbers hold, the runtime refuses."
        yield from wrapped(text, "", "bold red")
    if explained.never_evicts:
        bounded = any(pool.evicts for group in explained.groups for pool in group.layer.pools)
        total = plural(explained.plan.prompt[1] + explained.plan.max_new_tokens, "token")
        why = f"within these budgets all {total} stay" if bounded else "no pool has a budget"
        text = f"NEVER EVICTS at these lengths: {why}, so this is the full cache."
        yield from wrapped(text, "", "bold yellow" if bounded else "")


def _sections(explained: Explained) -> list[list[Group]]:
    """Groups of layers whose pools answer alike, but for how many may stay."""
    found: dict[tuple[object, ...], list[Group]] = {}
    for group in explained.groups:
        answers = [dict(pool_answers(pool, explained.plan.geometry, [])) for pool in group.layer.pools]
        words = tuple(
            (pool.name, *(answer for question, answer in given.items() if question != "stays"))
            for pool, given in zip(group.layer.pools, answers, strict=True)
        )
        found.setdefault(words, []).append(group)
    return list(found.values())


def _pools(alike: list[Group], plan: Plan) -> Iterator[str]:
    """The answers of each pool of one section, and what its scores cost."""
    first = alike[0]
    for index, pool in enumerate(first.layer.pools):
        yield f"  [bold]{escape(pool.name)}[/]"
        for question, answer in pool_answers(pool, plan.geometry, first.lines[index].budgets):
            if question == "stays":
                answer = _budgets(alike, index, plan) or answer
            yield from wrapped(answer, f"    {question:<7} ")
    paid = list(costs(plan, first.layer))
    for number, cost in enumerate(paid or ["nothing that attention does not do anyway"]):
        yield from wrapped(cost, "  [bold]scores cost[/]  " if not number else " " * 15)


def _budgets(alike: list[Group], index: int, plan: Plan) -> str | None:
    """A budget that differs between layers: as the policy writes it, and its range. None where it does not differ."""
    budgets = {group.layer.pools[index].budget for group in alike}
    if len(budgets) == 1:
        return None
    pools = plan.policy.pools_for(alike[0].indices[0], len(plan.layers)) or {}
    pool = pools.get(alike[0].layer.pools[index].name)
    if pool is None or pool.budget is None:
        return None
    bounds = [group.layer.pools[index].bound for group in alike]
    return f"{pool.budget.text} tokens: {min(bounds):,} to {max(bounds):,} by layer"


def _slots(group: Group, explained: Explained) -> Iterator[str]:
    layer = explained.plan.even(group.layer)
    mean = ", by head on average" if group.layer.shared else ""  # heads share some
    room = f"{layer.slots:,}, which keep at most {layer.bound:,} tokens after an update ({mib(layer.bytes)} a layer)"
    yield f"[bold]Slots[/] of {_layers(group.indices)}{mean}: {room}"
    for line in picture.slots(layer, group.lines):
        yield f"  {line}"


def _residents(lines: Sequence[PoolTimeline], plan: Plan) -> Iterator[str]:
    """Tokens at a few steps, and when the first leave."""
    steps = sorted({plan.max_new_tokens * i // COLUMNS for i in range(COLUMNS + 1)})
    rows = [("t", [f"{t:,}" for t in steps])]
    rows += [(line.name, [f"{line.resident[t]:,}" for t in steps]) for line in lines]
    if len(lines) > 1:
        rows.append(("resident", [f"{sum(line.resident[t] for line in lines):,}" for t in steps]))
    rows.append(("full cache", [f"{plan.prompt[1] + t:,}" for t in steps]))
    name = max(len(row[0]) for row in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    for title, cells in rows:
        yield f"  {escape(title):<{name}}  {'  '.join(f'{cell:>{width}}' for cell in cells)}"
    if plan.traits:
        kinds = " or ".join({"image": "an image's", "special": "special"}[trait] for trait in sorted(plan.traits))
        yield f"  (counted as if no token of the prompt were {kinds})"
    for line in lines:
        if line.first_eviction is not None:
            when = "at the end of the prompt" if line.first_eviction == 0 else f"at t = {line.first_eviction:,}"
            yield f"  {escape(line.name)}: the first token leaves {when}; {line.evicted:,} leave in all"


def _others(explained: Explained) -> Iterator[str]:
    for group in explained.groups[SHOWN:]:
        pools = explained.plan.even(group.layer).pools
        parts = ", ".join(f"{pool.name} {pool.bound:,} of {pool.capacity:,} slots" for pool in pools)
        yield f"  {_layers(group.indices)}: {escape(parts)}, {mib(group.layer.bytes)} a layer"


def _memory(plan: Plan) -> Iterator[str]:
    most = max(plan.bytes, plan.dense_bytes)
    stored = sum(b.bytes for layer in (*plan.layers, *plan.local) for b in layer.buffers if b.holds_tokens)
    saving = 1 - plan.bytes / plan.dense_bytes if plan.dense_bytes else 0.0
    share = f"{abs(saving):.0%} {'less' if saving >= 0 else 'more'}"
    yield f"[bold]Memory[/]: {share} than the full cache at the same lengths"
    yield f"  full cache  {picture.bar(plan.dense_bytes, most)} {mib(plan.dense_bytes)}"
    books = f"of it {mib(plan.bytes - stored)} bookkeeping"
    if plan.local:
        books += f" and {mib(plan.local_bytes)} for layers that no policy touches"
    yield f"  this cache  {picture.bar(plan.bytes, most)} {mib(plan.bytes)}, {books}"
    yield from wrapped(
        f"While the prompt is read, one layer at a time holds up to {plural(plan.prompt_peak, 'token')}: its slots and "
        f"{_beside_slots(plan)}.",
        "  ",
    )


def _shares(explained: Explained) -> Iterator[str]:
    """What each of several ranks holds, and what they tell one another."""
    if not explained.shares:
        return
    alike = len(set(explained.shares)) == 1
    held = mib(explained.shares[0]) if alike else ", ".join(map(mib, explained.shares))
    step, prompt = gathered(explained.plan)
    told = [f"{mib(step)} at each update of a step"] if step else []
    told += [f"{mib(prompt)} at the end of a prompt"] if prompt else []
    put = f"they gather {' and '.join(told)}, all layers together" if told else "no scores pass between them"
    yield from wrapped(f"Each of {len(explained.shares)} ranks holds {held}; {put}.", "  ")


def _beside_slots(plan: Plan) -> str:
    chunk = plan.prompt_chunk
    if chunk is None or plan.prompt[1] <= chunk:
        return "the prompt beside them, until the prompt's end decides who stays"
    return f"what they hold and {plural(chunk, 'token')} of the prompt beside them, until the chunk's end decides"


def _layers(indices: list[int]) -> str:
    """`layer 3`, `layers 0..29`, `layers 0, 2, 4`."""
    if len(indices) == 1:
        return f"layer {indices[0]}"
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"layers {indices[0]}..{indices[-1]}"
    return f"layers {', '.join(map(str, indices))}"


def mib(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} B"


def wrapped(text: str, lead: str, style: str = "") -> Iterator[str]:
    """A text of plain words as lines after `lead`, which is markup; further lines are indented below its end."""
    indent = len(lead.replace("[bold]", "").replace("[/]", ""))
    width = max(40, min(100, get_terminal_size((100, 24)).columns) - indent)
    for number, line in enumerate(textwrap.wrap(text, width) or [""]):
        said = f"[{style}]{escape(line)}[/]" if style else escape(line)
        yield (lead if not number else " " * indent) + said
