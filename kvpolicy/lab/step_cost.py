"""What one decode step costs under a policy: ratios, taken in one run.

    python -m kvpolicy.lab.step_cost overhead   a step with budget M against a full-cache step at length M
    python -m kvpolicy.lab.step_cost long-run   a step after 8,000 tokens against one after 1,000, per policy

Random weights, so nothing is downloaded; what is timed does not depend on what the weights say. Arms take turns in
small blocks, so that whatever else the machine does falls on all of them; the median of all steps is reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvpolicy.patching import apply, cache_for, compile_report

VOCABULARY = 1024  # a small head, so that the layers are what is timed


@dataclass
class Arm:
    """One way to decode: ``step(token)`` runs the model once; ``restore`` undoes growth between blocks."""

    name: str
    step: Callable[[torch.Tensor], Any]
    restore: Callable[[int], Any] | None = None
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.times) * 1e3

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile in milliseconds."""
        first, _, third = statistics.quantiles(self.times, n=4)
        return first * 1e3, third * 1e3


def random_model(layers: int, device: str) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights: 9 query heads on 3 KV heads of size 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).to(device).eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model object on the same weights, to be patched on its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def token(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.full((1, 1), 7, device=model.device)


def prompt_of(model: LlamaForCausalLM, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator).to(model.device)


def full_cache_arm(model: LlamaForCausalLM, length: int) -> Arm:
    """Transformers' own growing cache at a given length, eager."""
    cache = DynamicCache(config=model.config)
    model(prompt_of(model, length - 1), past_key_values=cache, logits_to_keep=1)
    return Arm(
        f"transformers DynamicCache, {length} tokens",
        lambda ids: model(ids, past_key_values=cache),
        lambda steps: cache.crop(-steps),
    )


def policy_arm(
    model: LlamaForCausalLM, policy: str, prompt: int, steps: int, compiled: bool, **params: object
) -> tuple[Arm, LlamaForCausalLM, Any]:
    """A policy on a twin of the model, its prompt read."""
    patched = apply(twin(model), policy, compile=compiled, **params)
    cache = cache_for(patched, prompt=prompt, max_new_tokens=steps)
    patched(prompt_of(model, prompt), past_key_values=cache, logits_to_keep=1)
    name = f"{policy}{', compiled' if compiled else ''}"
    return Arm(name, lambda ids: patched(ids, past_key_values=cache)), patched, cache


def take_turns(arms: list[Arm], ids: torch.Tensor, rounds: int, block: int) -> None:
    """Run ``rounds`` blocks of ``block`` timed steps of every arm, in turn."""
    for _ in range(rounds):
        for arm in arms:
            for _ in range(block):
                _synchronize(ids)
                start = time.perf_counter()
                arm.step(ids)
                _synchronize(ids)
                arm.times.append(time.perf_counter() - start)
            if arm.restore is not None:
                arm.restore(block)


def _synchronize(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


# The two questions ------------------------------------------------------------------------------------------------

BUDGET = 1024
# Prompts fill the budget almost, so that every policy evicts within a few dozen steps and holds BUDGET tokens.
AT_BUDGET: dict[str, dict[str, object]] = {
    "raas": {"budget": BUDGET},
    "scope-slide": {"alpha": BUDGET - 64, "beta1": 32, "beta2": 32},
    "scope-adaptive": {"alpha": BUDGET - 64, "beta1": 32, "beta2": 32, "horizon": 64},
    "scope-discontinuous": {"alpha": BUDGET - 64, "beta1": 16, "beta2": 48, "horizon": 112},
    "h2o": {"heavy": BUDGET // 2, "recent": BUDGET // 2},
}


@torch.no_grad()
def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """A step with budget M against a full-cache step at length M."""
    model = random_model(options.layers, options.device)
    block, warm = 4, 112
    steps = warm + options.rounds * block
    arms = [full_cache_arm(model, BUDGET)]
    counts: dict[str, Any] = {}
    for compiled in (False, True) if options.compile else (False,):
        arm, _, _ = policy_arm(model, "dense", BUDGET - steps // 2, steps, compiled)
        arms.append(arm)
        for name, params in AT_BUDGET.items():
            arm, patched, cache = policy_arm(model, name, BUDGET - 64, steps, compiled, **params)
            for _ in range(warm):
                arm.step(token(model))
            print(f"  {arm.name}: {cache.stats()['resident']} tokens resident", file=sys.stderr)
            counts[arm.name] = {"resident": cache.stats()["resident"], "evicted": cache.stats()["evicted"]}
            counts[arm.name] |= vars(compile_report(patched))
            arms.append(arm)
    for arm in arms:
        if arm.name.startswith("dense"):
            for _ in range(8):
                arm.step(token(model))
    take_turns(arms, token(model), options.rounds, block)
    reference = arms[0].median
    own = {arm.name.partition(",")[2]: arm.median for arm in arms if arm.name.startswith("dense")}
    rows = []
    for arm in arms:
        same_loop = own.get(arm.name.partition(",")[2]) if arm is not arms[0] else None
        ratio = None if same_loop is None else arm.median / same_loop
        row = {"arm": arm.name, "ms": arm.median, "quartiles": arm.spread}
        row |= {"against_transformers": arm.median / reference, "against_dense": ratio}
        rows.append(row | counts.get(arm.name, {}))
    return {"question": f"step at budget {BUDGET} / full-cache step at length {BUDGET}", "rows": rows}


@torch.no_grad()
def long_run(options: argparse.Namespace) -> dict[str, Any]:
    """Step cost after many tokens against step cost after few, each policy against itself."""
    model = random_model(options.layers, options.device)
    early, late = options.early, options.late
    window = 64  # steps timed around each point
    policies: dict[str, dict[str, object]] = {
        "raas": {"budget": 512},
        "scope-slide": {"alpha": 256, "beta1": 128, "beta2": 128},
        "scope-adaptive": {"alpha": 256, "beta1": 128, "beta2": 128, "horizon": 512},
        "scope-discontinuous": {"alpha": 256, "beta1": 128, "beta2": 128, "horizon": 512},
    }
    rows = []
    for name, params in policies.items():
        arms = []
        for seen in (early, late):
            arm, _, cache = policy_arm(model, name, 256, late + options.rounds * 4 + window, False, **params)
            for _ in range(seen - 256):
                arm.step(token(model))
            arms.append(Arm(f"{name} after {seen}", arm.step))
            evicted = cache.stats()["evicted"]
        take_turns(arms, token(model), options.rounds, 4)
        rows.append(_growth(arms, evicted))
    arms = [full_cache_arm(model, seen) for seen in (early, late)]
    take_turns(arms, token(model), options.rounds, 4)
    rows.append(_growth(arms, 0))
    return {"question": f"step after {late} tokens / step after {early}", "rows": rows}


def _growth(arms: list[Arm], evicted: int) -> dict[str, Any]:
    early, late = arms
    name = early.name.partition(" after")[0].partition(",")[0]
    ratio = late.median / early.median
    return {"arm": name, "early_ms": early.median, "late_ms": late.median, "ratio": ratio, "evicted": evicted}


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "layers": options.layers,
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield result["question"]
    for row in result["rows"]:
        cells = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        yield "  " + "  ".join(cells)


def main() -> None:
    """Measure, print ratios, and keep them with ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["overhead", "long-run"])
    parser.add_argument("--layers", type=int, default=30, help="decoder layers of the random model")
    parser.add_argument("--rounds", type=int, default=25, help="blocks of 4 timed steps per arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="overhead: time compiled steps as well")
    parser.add_argument("--early", type=int, default=1000)
    parser.add_argument("--late", type=int, default=8000)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    measure = overhead if options.question == "overhead" else long_run
    result = {**measure(options), "environment": _environment(options)}
    print("\n".join(_lines(result)))
    print(f"  {result['environment']}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
