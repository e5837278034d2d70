"""A cache's state by name: for copies with more rows, and for files.

A file is safetensors: nothing in it can run code. Its header says which policy, shape and lengths the cache was planned
for, and what the host counts; slots, rings and scorers' memories follow under the names that the plan gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.plan import ModelGeometry, make_plan

if TYPE_CHECKING:
    from kvpolicy.runtime.cache import PolicyCache

FORMAT = 1
KEY = "kvpolicy"


def copied(cache: PolicyCache, repeats: int = 1) -> PolicyCache:
    """A cache of its own with the same state, each row `repeats` times in a row.

    Raises:
        CacheError: a pass or a prompt turn is under way.
    """
    if repeats < 1:
        raise CacheError(f"a copy has each row once or more, not {repeats} times")
    _check_settled(cache)
    plan = cache.plan
    if repeats > 1:
        plan = make_plan(
            plan.policy,
            plan.geometry,
            batch=plan.batch * repeats,
            prompt=plan.prompt,
            max_new_tokens=plan.max_new_tokens,
            turns=plan.turns,
        )
    twin = type(cache)(plan, device=cache.devices, backend=cache.backend, rotation=cache.rotation, ranks=cache.ranks)
    tensors = state_of(cache)
    if repeats > 1:
        tensors = {name: tensor.repeat_interleave(repeats, 0) for name, tensor in tensors.items()}
    put_state(twin, counts_of(cache), tensors)
    for own, state in zip(twin.states, cache.states, strict=True):
        own.take(state, repeats)
    return twin


def save_cache(cache: PolicyCache, path: str | Path) -> None:
    """Write a cache to one safetensors file.

    Raises:
        CacheError: a pass or a prompt turn is under way.
    """
    _check_settled(cache)
    if cache.ranks.size > 1:
        raise CacheError(
            f"this cache holds the heads of one of {cache.ranks.size} ranks, and a file is read by a whole model; save "
            "a cache of the model in one process"
        )
    if cache.states:
        raise CacheError(
            "this model has layers that keep a state in place of tokens, and no file holds those yet; fork the cache "
            "with cache.copy(), or read the prompt again"
        )
    plan = cache.plan
    header = {
        "format": FORMAT,
        "policy": plan.policy.name,
        "digest": plan.policy.digest,
        "geometry": shape_of(plan.geometry),
        "plan": {
            "batch": plan.batch,
            "prompt": plan.prompt,
            "max_new_tokens": plan.max_new_tokens,
            "turns": plan.turns,
        },
        "counts": counts_of(cache),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state_of(cache).items()}
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def shape_of(geometry: ModelGeometry) -> dict[str, Any]:
    """A shape as JSON gives it back."""
    shape: dict[str, Any] = json.loads(json.dumps(asdict(geometry)))
    return shape


def read_header(path: str | Path) -> dict[str, Any]:
    """What a file says of the cache in it.

    Raises:
        CacheError: there is no such file, or it holds no cache that this version reads.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CacheError(f"no cache can be read from {path}: {reason}; give a file that cache.save wrote") from error
    if text is None:
        raise CacheError(f"{path} holds no cache; give a file that cache.save wrote")
    header: dict[str, Any] = json.loads(text)
    if header["format"] != FORMAT:
        raise CacheError(f"{path} is of format {header['format']}, and this kvpolicy reads {FORMAT}; upgrade it")
    return header


def load_state(cache: PolicyCache, path: str | Path, counts: Mapping[str, Any]) -> None:
    """Put the state in a file into an empty cache of the same plan.

    Raises:
        CacheError: the file has other tensors than this plan, as another version of kvpolicy may write.
    """
    with safe_open(path, framework="pt", device=str(cache.device)) as file:
        said = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        ours = {name: tuple(tensor.shape) for name, tensor in state_of(cache).items()}
        if said != ours:
            odd = sorted(name for name in said.keys() | ours.keys() if said.get(name) != ours.get(name))
            raise CacheError(
                f"{path} does not fit what this version of kvpolicy allocates for its plan ('{odd[0]}' differs): read "
                "the prompt again, or load it with the version that wrote it"
            )
        put_state(cache, counts, {name: file.get_tensor(name) for name in said})


def state_of(cache: PolicyCache) -> dict[str, Tensor]:
    """Every tensor of a cache by name; all have rows first."""
    clocks = cache.clocks
    named = {"t": clocks.t, "prompt_len": clocks.prompt_len, "position": clocks.position}
    if clocks.special is not None:
        named["special"] = clocks.special
    for number, clock in enumerate(clocks.streams):
        for name in ("seen", "fill", "opened", "ordinal"):
            named[f"{number}.{name}"] = getattr(clock, name)
    tensors = {f"clocks.{name}": tensor for name, tensor in named.items()}
    for index, layer in enumerate(cache.governed):
        for group, part in enumerate(layer.parts):
            tensors |= {f"layers.{index}.{group}.{name}": tensor for name, tensor in part.state.tensors.items()}
    for index, local in enumerate(cache.local):
        tensors |= {f"local.{index}.{name}": tensor for name, tensor in local.tensors.items()}
    return tensors


def counts_of(cache: PolicyCache) -> dict[str, Any]:
    """What the host knows without asking the device."""
    return {
        "t": cache.clocks.host_t,
        "columns": cache.clocks.columns,
        "passes": dict(cache.passes),
        "fills": [sorted(clock.host_fills) for clock in cache.clocks.streams],
    }


def put_state(cache: PolicyCache, counts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Overwrite a cache with what `counts_of` and `state_of` gave of one planned alike."""
    for name, tensor in state_of(cache).items():
        tensor.copy_(tensors[name])
    cache.clocks.host_t, cache.clocks.columns = counts["t"], counts["columns"]
    cache.passes = dict(counts["passes"])
    for clock, fills in zip(cache.clocks.streams, counts["fills"], strict=True):
        clock.host_fills = set(fills)
    for site in cache.sites[1:]:
        site.clocks.follow(cache.clocks)


def _check_settled(cache: PolicyCache) -> None:
    if cache.moment.kind is not None or cache.turn_columns:
        raise CacheError("a cache can be copied or saved between turns only, not inside a pass or a chunked prompt")
