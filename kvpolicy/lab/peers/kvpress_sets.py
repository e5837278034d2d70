"""Which tokens kvpress's presses keep of a prompt, and which our policies do: the same model, the same numbers.

    python -m kvpolicy.lab.peers.kvpress_sets

A tiny random Llama reads a prompt in kvpress's own environment (``kvpress.py`` makes it); every press compresses its
cache, and what is left is told by position. The queries, keys and values that the presses saw go to our oracle, so no
difference comes from the models. Where a press and a method's paper part, ``departs`` says how, and a second case says
the press's own rule in our language, which must keep the same tokens. Exit code 1 where sets differ that should not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_model

from kvpolicy.lab.peers.kvpress import KVPRESS, default_environment, environment_of_kvpress
from kvpolicy.language import Policy, load_policy, loads_policy
from kvpolicy.testing.attention import Attention
from kvpolicy.testing.feeding import OracleAlone, passes, plan_for
from kvpolicy.testing.models import random_model

PROMPT, KEPT, WINDOW, KERNEL, SINKS, LAG, BETA, LAYERS = 160, 64, 8, 5, 4, 32, 4, 3

Sets = dict[tuple[int, int], frozenset[int]]
"""(layer, KV head) -> positions."""


@dataclass(frozen=True)
class Case:
    """A press beside a policy.

    press: its class in kvpress and its arguments; ``of`` is the press that it wraps. kept: tokens of the prompt that
    the press is asked to keep. policy: a shipped one with ``sizes``; ``text`` is what goes over it. departs: why the
    sets may differ; without it they must not.
    """

    name: str
    press: str
    policy: str
    sizes: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    of: tuple[str, Mapping[str, Any]] | None = None
    kept: int = KEPT
    text: str = ""
    departs: str = ""

    def ours(self) -> Policy:
        """Our side of the comparison. Raises PolicyError."""
        if not self.text:
            return load_policy(self.policy, set=dict(self.sizes))
        return loads_policy(
            f"kvpolicy: 1\nname: {self.policy}-as-kvpress\nextends: {self.policy}\n{self.text}", set=dict(self.sizes)
        )

    def theirs(self) -> dict[str, Any]:
        """What the worker is told. The ratio is that of a hair more, so that no rounding takes a token away."""
        ratio = 1 - (self.kept + 1e-6) / PROMPT
        press: dict[str, Any] = {"press": self.press, "arguments": dict(self.arguments), "ratio": ratio, "of": None}
        if self.of is not None:
            press["of"] = {"press": self.of[0], "arguments": dict(self.of[1])}
        return press


OBSERVED = {"window_size": WINDOW, "kernel_size": KERNEL}
SNAPKV = {"budget": KEPT, "window": WINDOW, "kernel": KERNEL}
MEAN = "pools: {prompt: {scorer: {signal: attention, queries: {last: window}, smooth: {mean: kernel}}}}"
POOLED = "neighbours share their best score, as in the paper's runs; kvpress gives them their mean"
PYRAMID = """
let:
  widest: min(2 * budget - budget / beta, prompt_len - window)
pools:
  prompt:
    budget: round(widest - layer * 2 * (widest - budget) / max(1, layers - 1))
    scorer: {signal: attention, queries: {last: window}, smooth: {mean: kernel}}
"""
LEFT = PROMPT - SINKS
CUT = LEFT // LAG - 1
LAGGED = SINKS + CUT * (LAG // 2) + LEFT - CUT * LAG

CASES = (
    Case("snapkv", "SnapKVPress", "snapkv", SNAPKV, OBSERVED, departs=POOLED),
    Case("snapkv, mean of neighbours", "SnapKVPress", "snapkv", SNAPKV, OBSERVED, text=MEAN),
    Case(
        "pyramidkv", "PyramidKVPress", "pyramidkv", {**SNAPKV, "beta": BETA}, {**OBSERVED, "beta": BETA},
        departs=f"{POOLED}; a layer's share leaves out the window, which stays beside it; kvpress counts it in",
    ),
    Case(
        "pyramidkv, window counted in", "PyramidKVPress", "pyramidkv", {**SNAPKV, "beta": BETA},
        {**OBSERVED, "beta": BETA}, text=PYRAMID,
    ),
    Case(
        "ada-kv", "AdaKVPress", "ada-kv", {**SNAPKV, "safeguard": "20%"}, {"alpha_safeguard": 0.2},
        ("SnapKVPress", OBSERVED),
        departs=f"{POOLED}; a head keeps a blend of what it wins and its own share; in kvpress that share is a least",
    ),
    Case(
        "ada-kv, no safeguard", "AdaKVPress", "ada-kv", {**SNAPKV, "safeguard": "0"}, {"alpha_safeguard": 0.0},
        ("SnapKVPress", OBSERVED), text=MEAN,
    ),
    Case("knorm", "KnormPress", "knorm", {"budget": KEPT}),
    Case("keydiff, in one block", "KeyDiffPress", "keydiff", {"budget": KEPT, "block": PROMPT}),
    Case(
        "keydiff", "BlockPress", "keydiff", {"budget": KEPT, "block": 32}, {"block_size": 32}, ("KeyDiffPress", {})
    ),
    Case(
        "tova", "TOVAPress", "tova", {"budget": KEPT},
        departs="the newest token competes, as in the paper; kvpress always keeps it",
    ),
    Case("tova, newest kept", "TOVAPress", "tova", {"budget": KEPT}, text="pools: {all: {window: 1}}"),
    Case(
        "streaming-llm", "StreamingLLMPress", "streaming-llm", {"sinks": SINKS, "window": KEPT - SINKS},
        {"n_sink": SINKS},
    ),
    Case(
        "lagkv", "LagKVPress", "lagkv", {"sinks": SINKS, "lag": LAG, "ratio": "50%"},
        {"n_sink": SINKS, "lag_size": LAG}, kept=LAGGED,
    ),
    Case(
        "h2o", "ObservedAttentionPress", "h2o", {"heavy": KEPT - 1, "recent": 1},
        departs="attention is summed, as in the paper; kvpress divides by how many queries could see a token",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of a case: tokens kept by each, and the share of theirs that is ours, over all layers and KV heads."""

    case: Case
    ours: int
    theirs: int
    common: int
    where: tuple[str, ...]

    @property
    def same(self) -> bool:
        return self.ours == self.theirs == self.common

    @property
    def wrong(self) -> bool:
        """Whether the sets differ and nobody said they would."""
        return not self.same and not self.case.departs

    def __str__(self) -> str:
        share = self.common / max(self.ours, self.theirs, 1)
        said = "the same" if self.same else (self.case.departs or f"DIFFERS in {'; '.join(self.where[:3])}")
        return f"{self.case.name:28} {self.case.press:22} {self.ours:6} {self.theirs:6} {share:8.1%}  {said}"


def told(python: Path, folder: Path, seed: int) -> tuple[Attention, list[Sets]]:
    """What the worker saw and kept: the attention of every layer, and the sets of every case."""
    model = random_model("llama", seed=seed, num_hidden_layers=LAYERS, vocab_size=4 * PROMPT)
    generator = torch.Generator().manual_seed(seed)
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))
    order = {
        "prompt": torch.randperm(4 * PROMPT, generator=generator)[:PROMPT].tolist(),  # twins would tie
        "cases": [case.theirs() for case in CASES],
    }
    (folder / "order.json").write_text(json.dumps(order))
    worker = Path(__file__).with_name("kvpress_sets_worker.py")
    done = subprocess.run([str(python), "-P", str(worker), str(folder)])
    if done.returncode:
        raise SystemExit(f"kvpress ended with exit code {done.returncode}; its error is above")
    seen = load_file(folder / "seen.safetensors")
    queries, keys, values = ((seen[name].astype(np.float32),) for name in ("queries", "keys", "values"))
    answers = json.loads((folder / "kept.json").read_text())
    sets = [
        {(layer, head): frozenset(kept) for layer, heads in enumerate(answer) for head, kept in enumerate(heads)}
        for answer in answers
    ]
    return Attention((PROMPT,), 0, queries, keys, values), sets


def kept_by_us(policy: Policy, said: Attention) -> Sets:
    """What a policy keeps once the prompt has been read, by the oracle."""
    plan, kept = plan_for(policy, said), dict[tuple[int, int], frozenset[int]]()
    feed = OracleAlone(plan)
    for now in passes(said, None if policy.prompt_chunk is None else int(policy.prompt_chunk.evaluate({}))):
        for step in feed.feed(said, now):
            for head, pools in enumerate(step.heads):
                kept[step.layer, head] = frozenset().union(*(pool.kept for pool in pools.values()))
    return kept


def compared(case: Case, ours: Sets, theirs: Sets) -> Row:
    """The sets of a case side by side."""
    where = tuple(
        f"layer {layer}, KV head {head}: ours alone {sorted(ours[layer, head] - kept)[:4]}, theirs alone "
        f"{sorted(kept - ours[layer, head])[:4]}"
        for (layer, head), kept in theirs.items()
        if kept != ours[layer, head]
    )
    common = sum(len(kept & ours[cell]) for cell, kept in theirs.items())
    return Row(case, sum(map(len, ours.values())), sum(map(len, theirs.values())), common, where)


def compare(python: Path, seed: int) -> list[Row]:
    """Every case under one random model and prompt."""
    with tempfile.TemporaryDirectory() as folder:
        said, sets = told(python, Path(folder), seed)
    return [compared(case, kept_by_us(case.ours(), said), theirs) for case, theirs in zip(CASES, sets, strict=True)]


def main() -> int:
    """Compare, print, and keep the numbers with ``--json``; returns 1 where sets differ and should not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=default_environment(), help="an environment with kvpress")
    parser.add_argument("--seeds", type=int, default=3, help="random models and prompts, each compared")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    python = environment_of_kvpress(options.env)
    rows = {seed: compare(python, seed) for seed in range(options.seeds)}
    print(f"kvpress {KVPRESS}: a prompt of {PROMPT} tokens, {LAYERS} layers of 2 KV heads; tokens kept in all of them")
    for seed, of_seed in rows.items():
        print(f"\nseed {seed:<23} {'press':22} {'ours':>6} {'theirs':>6} {'common':>8}")
        for row in of_seed:
            print(row)
    wrong = [row for of_seed in rows.values() for row in of_seed if row.wrong]
    if options.json is not None:
        written = [
            {"seed": seed, "case": row.case.name, "press": row.case.press, "policy": row.case.policy, "ours": row.ours,
             "theirs": row.theirs, "common": row.common, "same": row.same, "departs": row.case.departs,
             "where": list(row.where)}
            for seed, of_seed in rows.items() for row in of_seed
        ]  # fmt: skip
        options.json.write_text(json.dumps({"kvpress": KVPRESS, "rows": written}, indent=2) + "\n")
    for row in wrong:
        print(f"undocumented difference: {row.case.name}: {'; '.join(row.where)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
