"""`kvpolicy explain`: what a policy comes to, in tokens and bytes, before a model is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.markup import escape

from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Settings, Spec, parse_settings
from kvpolicy.cli.words import needs_words, pool_answers, slot_bar, slot_legend
from kvpolicy.language import load_policy
from kvpolicy.models import load_config
from kvpolicy.plan import LayerPlan, ModelGeometry, Plan, make_plan, unsupported
from kvpolicy.plan.sizes import Lengths, size_pools

EPILOG = (
    "Examples: kvpolicy explain raas; kvpolicy explain scope-slide --set alpha=4k --context 8k --max-new-tokens 4k; "
    "kvpolicy explain my.yaml --model ./my-model --batch 8 --dtype bfloat16 --json."
)


def run(
    spec: Spec,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Whose shape: builtin:…, a folder, a hub id or a .gguf file.")
    ] = "builtin:smollm2",
    context: Annotated[str, typer.Option("--context", "-c", help="Prompt tokens, as in 512 or 32k.")] = "512",
    new_tokens: Annotated[str, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.")] = "2k",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Rows of the cache.")] = 1,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the model's own.")] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Say what a policy keeps, when, and in how many bytes. Reads a model's config, never its weights."""
    policy = load_policy(spec, set=parse_settings(settings))
    geometry = ModelGeometry.from_config(load_config(model), dtype)
    lengths = tokens(context, "--context"), tokens(new_tokens, "--max-new-tokens")
    plan = make_plan(policy, geometry, batch=batch, prompt=lengths[0], max_new_tokens=lengths[1])
    if json:
        output.json_object(facts(plan, model))
        return
    for line in page(plan, model):
        output.data(line)


def tokens(text: str, flag: str) -> int:
    """A number of tokens as people write it: 512, 4k.

    Raises:
        typer.BadParameter: it is none.
    """
    digits = text.strip().lower()
    factor = 1024 if digits.endswith("k") else 1
    number = digits.removesuffix("k")
    if not number.isascii() or not number.isdigit() or len(number) > 9:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write it as 512 or 4k", param_hint=flag)
    return int(number) * factor


def page(plan: Plan, model: str) -> Iterator[str]:
    """The explanation as lines of rich markup."""
    policy, shape = plan.policy, plan.geometry
    cite = f"  ({', '.join(policy.cite)})" if policy.cite else ""
    yield f"[bold]{escape(policy.name)}[/]{escape(cite)}: {escape(policy.summary)}"
    for name, param in policy.params.items():
        yield f"  --set {escape(name)}={escape(param.value.text)}  {escape(param.help)}"
    yield (
        f"\non {escape(model)}: {shape.layers} layers, {shape.query_heads} query heads on {shape.kv_heads} KV heads of "
        f"size {shape.head_dim}, {shape.dtype}; {plan.batch} row{'s' if plan.batch > 1 else ''}, prompt of "
        f"{plan.prompt[1]} tokens, {plan.max_new_tokens} to generate"
    )
    for layers, layer in shapes(plan):
        yield from _layer(layers, layer, plan)
    yield from _memory(plan)
    reasons = list(dict.fromkeys(unsupported(plan)))
    if reasons:
        yield f"\n[red]The runtime cannot run this yet:[/] {escape('; '.join(reasons))}"
    elif plan.never_fires:
        yield "\n[yellow]This policy never evicts anything at these lengths: it is the full cache.[/]"


def shapes(plan: Plan) -> Iterator[tuple[list[int], LayerPlan]]:
    """Layers of equal numbers together, in order of the first: (their indices, one of them)."""
    groups: dict[LayerPlan, list[int]] = {}
    for layer in plan.layers:
        groups.setdefault(replace(layer, index=0), []).append(layer.index)
    for layer, indices in groups.items():
        yield indices, layer


def _layer(layers: list[int], layer: LayerPlan, plan: Plan) -> Iterator[str]:
    named = (
        f"layers {layers[0]}..{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else f"layers {layers}"
    )
    yield f"\n[bold]{named}[/]: {layer.slots} slots per row and KV head, at most {layer.bound} resident after an update"
    yield f"  {slot_bar(layer)}"
    yield f"  {slot_legend(layer)}"
    for pool in layer.pools:
        yield f"  pool [bold]{escape(pool.name)}[/]"
        for question, answer in pool_answers(pool):
            yield f"    {question + ':':<26} {escape(answer)}"
        yield f"    {'resident, allocated:':<26} at most {pool.bound} tokens, {pool.capacity} slots"
    yield f"  scorers read: {needs_words(layer)}"
    steps = sorted({0, *(plan.max_new_tokens * i // 4 for i in range(1, 5))})
    table = "   ".join(f"t={t}: {bound}" for t, bound in zip(steps, residents(plan, layer, steps), strict=True))
    yield f"  resident at most by step: {table}"


def residents(plan: Plan, layer: LayerPlan, steps: list[int]) -> list[int]:
    """The most tokens that may be resident at step t, for each t."""
    bounds = []
    for t in steps:
        lengths = Lengths(plan.prompt, t, plan.turns, plan.geometry.kv_heads)
        bounds.append(sum(pool.bound for pool in size_pools(layer.pools, layer.order, lengths)))
    return bounds


def _memory(plan: Plan) -> Iterator[str]:
    saving = 1 - plan.bytes / plan.dense_bytes if plan.dense_bytes else 0
    share = f"{abs(saving):.0%} {'less' if saving >= 0 else 'more'} than"
    yield f"\nmemory: [bold]{mib(plan.bytes)}[/], {share} the full cache's {mib(plan.dense_bytes)} at the same lengths"
    yield f"  while the prompt is read, one layer at a time holds {plan.prompt_peak} tokens: its slots and the prompt"


def mib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def facts(plan: Plan, model: str) -> dict[str, Any]:
    """The plan for machines."""
    shape = plan.geometry
    return {
        "policy": plan.policy.name,
        "digest": plan.policy.digest,
        "summary": plan.policy.summary,
        "params": {name: param.value.text for name, param in plan.policy.params.items()},
        "model": model,
        "geometry": vars(shape) | {"group": shape.group},
        "batch": plan.batch,
        "prompt_tokens": plan.prompt[1],
        "max_new_tokens": plan.max_new_tokens,
        "cache_bytes": plan.bytes,
        "dense_cache_bytes": plan.dense_bytes,
        "resident_bound": plan.resident_bound,
        "prompt_peak": plan.prompt_peak,
        "never_fires": plan.never_fires,
        "unsupported": list(dict.fromkeys(unsupported(plan))),
        "layers": [_layer_facts(indices, layer) for indices, layer in shapes(plan)],
    }


def _layer_facts(indices: list[int], layer: LayerPlan) -> dict[str, Any]:
    return {
        "layers": indices,
        "slots": layer.slots,
        "bound": layer.bound,
        "bytes": layer.bytes,
        "reads": needs_words(layer),
        "pools": [
            {
                "name": pool.name,
                "admits": sorted(pool.admits),
                "page": pool.page,
                "budget": None if pool.budget is None else pool.budget.text,
                "window": None if pool.window is None else pool.window.text,
                "cadence": pool.cadence,
                "capacity": pool.capacity,
                "bound": pool.bound,
            }
            for pool in layer.pools
        ],
        "buffers": [{"name": b.name, "shape": b.shape, "dtype": b.dtype, "bytes": b.bytes} for b in layer.buffers],
    }
