"""`kvpolicy explain`: what a policy comes to, in tokens and bytes, before a model is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from kvpolicy.architecture import architectures
from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json, Settings, Spec, parse_settings
from kvpolicy.cli.page import page
from kvpolicy.cli.words import costs, pool_answers
from kvpolicy.errors import UsageError
from kvpolicy.language import load_policy
from kvpolicy.models.shapes import SHAPES, shape_named, shape_of
from kvpolicy.plan import LayerPlan, Plan, PoolPlan, gathered, make_plan, on_rank, unsupported
from kvpolicy.plan.signals import layer_needs
from kvpolicy.plan.timeline import PoolTimeline, timeline

DEFAULT_MODEL = "builtin:smollm2"
POINTS = 64
"""Steps, evenly spread, at which `--json` tells how many tokens are resident (and at t = 0)."""

EPILOG = (
    "Examples: kvpolicy explain raas; kvpolicy explain scope-slide --shape llama-3.1-8b --context 8k -n 4k; "
    "kvpolicy explain my.yaml --model ./my-model --batch 8 --dtype bfloat16 --json."
)


def run(
    spec: Spec,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Whose shape: builtin:…, a folder, a config.json, a hub id, a .gguf file."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help=f"A published model's shape instead: {', '.join(SHAPES)}.")
    ] = None,
    context: Annotated[str, typer.Option("--context", "-c", help="Prompt tokens, as in 512 or 32k.")] = "512",
    new_tokens: Annotated[str, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.")] = "2k",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Rows of the cache.")] = 1,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the model's own.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="This layer alone; -1 is the last.")] = None,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Also what each of so many processes holds that share the heads.")
    ] = 1,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Say what a policy keeps, when, and in how many bytes. Reads a model's config, never its weights."""
    if model is not None and shape is not None:
        raise UsageError("--model and --shape both give a shape; drop one")
    policy = load_policy(spec, set=parse_settings(settings))
    geometry = shape_of(model or DEFAULT_MODEL, dtype) if shape is None else shape_named(shape, dtype)
    prompt, new = tokens(context, "--context"), tokens(new_tokens, "--max-new-tokens")
    plan = make_plan(policy, geometry, batch=batch, prompt=prompt, max_new_tokens=new)
    shares = tuple(on_rank(plan, rank, ranks).bytes for rank in range(ranks)) if ranks > 1 else ()
    explained = Explained(plan, shape or model or DEFAULT_MODEL, list(groups(plan, layer)), shares)
    if json:
        output.json_object(facts(explained))
        return
    for line in page(explained):
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


@dataclass(frozen=True)
class Group:
    """Layers of equal numbers: their indices, the plan of one of them, and its pools over time."""

    indices: list[int]
    layer: LayerPlan
    lines: list[PoolTimeline]


@dataclass(frozen=True)
class Explained:
    """A plan, the model that it is for, and its layers in groups of equal numbers; ``shares`` are the bytes of each
    rank where several share the heads."""

    plan: Plan
    model: str
    groups: list[Group]
    shares: tuple[int, ...] = ()

    @property
    def refusals(self) -> list[str]:
        """Why this cannot be run yet; nothing where it can."""
        reasons = list(dict.fromkeys(unsupported(self.plan)))
        if self.plan.geometry.model_type not in architectures():
            reasons.append(f"models of type {self.plan.geometry.model_type}")
        return reasons

    @property
    def never_evicts(self) -> bool:
        """Whether no token ever leaves any of these layers at these lengths."""
        return not any(line.evicted for group in self.groups for line in group.lines)


def groups(plan: Plan, only: int | None = None) -> Iterator[Group]:
    """Layers of equal numbers together, in order of the first; `only` one layer where it is given.

    Raises:
        UsageError: the model has no such layer.
    """
    count = len(plan.layers)
    if only is not None and not -count <= only < count:
        raise UsageError(f"--layer {only}: this model has layers 0..{count - 1}")
    found: dict[LayerPlan, list[int]] = {}
    for layer in plan.layers if only is None else [plan.layers[only]]:
        found.setdefault(replace(layer, index=0), []).append(layer.index)
    for layer, indices in found.items():
        yield Group(indices, layer, timeline(plan, layer))


# For machines ----------------------------------------------------------------------------------------------------


def facts(explained: Explained) -> dict[str, Any]:
    """The plan as plain data. Tokens are counted per row and KV head, bytes over all of them."""
    plan, policy = explained.plan, explained.plan.policy
    return {
        "policy": policy.name,
        "digest": policy.digest,
        "summary": policy.summary,
        "cite": list(policy.cite),
        "params": {name: param.value.text for name, param in policy.params.items()},
        "model": explained.model,
        "geometry": vars(plan.geometry) | {"group": plan.geometry.group},
        "batch": plan.batch,
        "prompt_tokens": plan.prompt[1],
        "max_new_tokens": plan.max_new_tokens,
        "cache_bytes": plan.bytes,
        "planned_cache_bytes": plan.bytes,
        "dense_cache_bytes": plan.dense_bytes,
        "resident_bound": plan.resident_bound,
        "prompt_peak": plan.prompt_peak,
        "ranks": _rank_facts(explained) if explained.shares else None,
        "never_fires": plan.never_fires,
        "never_evicts": explained.never_evicts,
        "unsupported": explained.refusals,
        "clocks": [vars(buffer) | {"bytes": buffer.bytes} for buffer in plan.clocks],
        "layers": [_group_facts(group, plan) for group in explained.groups],
    }


def _rank_facts(explained: Explained) -> dict[str, Any]:
    step, prompt = gathered(explained.plan)
    return {
        "count": len(explained.shares),
        "cache_bytes": list(explained.shares),
        "gathered_bytes_per_update": step,
        "gathered_bytes_per_prompt": prompt,
    }


def _group_facts(group: Group, plan: Plan) -> dict[str, Any]:
    layer = group.layer
    steps = sorted({plan.max_new_tokens * i // POINTS for i in range(POINTS + 1)})
    residents = [sum(line.resident[t] for line in group.lines) for t in steps]
    return {
        "layers": group.indices,
        "dense": layer.dense,
        "slots": layer.slots,
        "shared_slots": sum(pool.capacity for pool in layer.shared),
        "bound": layer.bound,
        "bytes": layer.bytes,
        "needs": sorted(layer_needs(layer)),
        "costs": list(costs(plan, layer)),
        "update_order": [layer.pools[index].name for index in layer.order],
        "residents": {"t": steps, "tokens": residents},
        "pools": [_pool_facts(pool, line, plan, steps) for pool, line in zip(layer.pools, group.lines, strict=True)],
        "buffers": [vars(buffer) | {"bytes": buffer.bytes} for buffer in layer.buffers],
    }


def _pool_facts(pool: PoolPlan, line: PoolTimeline, plan: Plan, steps: list[int]) -> dict[str, Any]:
    quantities = {"budget": pool.budget, "window": pool.window, "first": pool.first}
    return {
        "name": pool.name,
        "answers": dict(pool_answers(pool, plan.geometry, line.budgets)),
        "admits": sorted(pool.admits),
        "page": pool.page,
        **{name: None if quantity is None else quantity.text for name, quantity in quantities.items()},
        "cadence": pool.cadence,
        "scope": pool.scope,
        "to": pool.to,
        "offset": pool.offset,
        "shared": pool.shared,
        "capacity": pool.capacity,
        "bound": pool.bound,
        "first_eviction": line.first_eviction,
        "evicted": line.evicted,
        "residents": [line.resident[t] for t in steps],
    }
