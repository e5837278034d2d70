"""What storing keys and values in few bits costs: errors against the unquantised cache, and bytes.

    python -m kvpolicy.lab.stored_error builtin:tiny --policy kivi --bits 8,4,2

The same text is read under the policy as it is and under the same policy that stores everything at the model's
precision, token by token (teacher forcing), so that the two caches hold the same tokens. Printed for each number of
bits: the greatest error of a stored number, in steps of its group's scale (half a step is what rounding may do, and the
scale's own dtype adds a little); the error of stored keys and values, relative to their norm; KL(unquantised || stored)
of the next token in nats and how often both put the same one first; and what the stored pools take, in bytes and as a
share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.language import Policy, load_policy
from kvpolicy.models import load_model
from kvpolicy.models.builtin import DEMO
from kvpolicy.patching import applied, cache_for
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.stored import dequantised

SIDES = ("keys", "values")


@dataclass(frozen=True)
class Row:
    """One number of bits. Errors are those of the first layer, where both caches were given the same numbers."""

    policy: str
    model: str
    bits: int
    stored_tokens: int
    worst_in_steps: float
    key_error: float
    value_error: float
    mean_kl: float
    top1: float
    bytes: int
    planned_bytes: int
    share: float


def measure(model: Any, name: str, ids: Tensor, prompt: int, policy: Policy) -> Row:
    """A policy with stored pools beside its unquantised twin, over the text ``ids`` [1, N] after a prompt.

    Raises:
        UsageError: nothing was stored, or the policy stores in no pool.
    """
    whole = twin(policy)
    stored_logits, stored = read(model, policy, ids, prompt)
    whole_logits, unquantised = read(model, whole, ids, prompt)
    tokens, worst, errors = compare(stored, unquantised)
    log_stored, log_whole = stored_logits.log_softmax(-1), whole_logits.log_softmax(-1)
    return Row(
        policy=policy.name,
        model=name,
        bits=bits_of(policy),
        stored_tokens=tokens,
        worst_in_steps=worst,
        key_error=errors["keys"],
        value_error=errors["values"],
        mean_kl=float((log_whole.exp() * (log_whole - log_stored)).sum(-1).mean()),
        top1=float((log_stored.argmax(-1) == log_whole.argmax(-1)).float().mean()),
        bytes=stored.bytes,
        planned_bytes=stored.plan.bytes,
        share=_held(stored) / _held(unquantised),
    )


def twin(policy: Policy) -> Policy:
    """The same policy with every pool at the model's precision."""
    stored = [name for name, pool in policy.pools.items() if pool.store is not None]
    if not stored:
        raise UsageError(
            f"no pool of {policy.name} is stored in few bits; `store: {{bits: 8, …}}` says that it should be"
        )
    plain = {name: pool.model_copy(update={"store": None}) for name, pool in policy.pools.items()}
    return policy.model_copy(update={"pools": plain})


def bits_of(policy: Policy) -> int:
    """The fewest bits of any pool."""
    return min(int(pool.store.bits.constant or 0) for pool in policy.pools.values() if pool.store is not None)


@torch.no_grad()
def read(model: Any, policy: Policy, ids: Tensor, prompt: int) -> tuple[Tensor, PolicyCache]:
    """Logits [N - prompt, V] of every token after the prompt, and the cache as it was left."""
    with applied(model, policy):
        cache = cache_for(model, prompt=prompt, max_new_tokens=ids.shape[1] - prompt)
        logits = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1]]
        logits += [
            model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1] for at in range(prompt, ids.shape[1])
        ]
    return torch.cat(logits).float(), cache


def compare(stored: PolicyCache, whole: PolicyCache) -> tuple[int, float, dict[str, float]]:
    """Of the first layer: stored tokens, the greatest error in steps, and relative errors of keys and values."""
    one, other = next(stored.parts()).state, next(whole.parts()).state
    tokens, worst, off, norm = 0, 0.0, dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0.0)
    for pool in one.plan.pools:
        if pool.store is None:
            continue
        position, place = one.slot_positions(pool), other.slot_positions(other.pools[pool.name])
        written = (position >= 0).unflatten(2, (pool.units, pool.page)).all(-1).repeat_interleave(pool.page, -1)
        if pool.stages:
            written[one.rows, one.heads, one.newest_unit(pool) * pool.page] = False
        for side, by in zip(SIDES, (pool.store.keys, pool.store.values), strict=True):
            read_as = dequantised(one, pool, side).float()
            step = one.tensors[f"{pool.name}.{side}.scale"].float()
            step = step.repeat_interleave(pool.store.group, 2 if by == "channel" else 3)[..., : read_as.shape[-1]]
            real = other.tensors[side][:, :, other.span(other.pools[pool.name])].float()
            for row, head, slot in written.nonzero().tolist():
                same = (place[row, head] == position[row, head, slot]).nonzero()
                error = (read_as[row, head, slot] - real[row, head, int(same[0, 0])]).abs()
                worst = max(worst, float((error / step[row, head, slot].clamp(min=1e-12)).max()))
                off[side] += float(error.square().sum())
                norm[side] += float(real[row, head, int(same[0, 0])].square().sum())
        tokens += int(written.sum())
    if not tokens:
        raise UsageError("the text is too short: nothing was stored")
    return tokens, worst, {side: (off[side] / norm[side]) ** 0.5 for side in SIDES}


def _held(cache: PolicyCache) -> int:
    return sum(buffer.bytes for layer in cache.plan.layers for buffer in layer.buffers if buffer.holds_tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy.lab.stored_error", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("model", nargs="?", default="builtin:tiny")
    parser.add_argument("--policy", default="kivi", help="a policy that stores some pool in few bits")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a param of the policy")
    parser.add_argument("--bits", default="8,4,2", help="values for its param `bits`, if it has one")
    parser.add_argument("--text", type=Path, default=DEMO, help="a text file to read")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the text to read")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        rows = list(_rows(asked))
    except (KvpolicyError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    return 0


def _rows(asked: argparse.Namespace) -> Any:
    model, tokenizer = load_model(asked.model)
    ids = tokenizer(asked.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids.repeat(1, -(-asked.tokens // ids.shape[1]))[:, : asked.tokens].to(model.device)
    given = dict(pair.split("=", 1) for pair in asked.set)
    if not asked.json:
        print("bits  stored  worst/step  key error  value error  mean KL   top-1   bytes       share of unquantised")
    told = "bits" in load_policy(asked.policy).params  # else the policy has its own number of bits
    for more in [{"bits": int(bits)} for bits in asked.bits.split(",")] if told else [{}]:
        policy = load_policy(asked.policy, set={**given, **more})
        row = measure(model, asked.model, ids, ids.shape[1] // 2, policy)
        if not asked.json:
            print(
                f"{row.bits:4}  {row.stored_tokens:6}  {row.worst_in_steps:10.3f}  {row.key_error:9.2%}  "
                f"{row.value_error:11.2%}  {row.mean_kl:7.4f}  {row.top1:6.1%}  {row.bytes:10,}  {row.share:.1%}"
            )
        yield row


if __name__ == "__main__":
    sys.exit(main())
