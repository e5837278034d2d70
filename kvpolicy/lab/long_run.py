"""Every method writes a long text, compiled: no recompile, no NaN, no babble that the full cache does not show.

    python -m kvpolicy.lab.long_run --model builtin:smollm2 --out long.jsonl

Each policy gets one line of JSON as soon as it is done, and a second run with the same file goes on where the first one
ended, so that a night that is cut short is not lost. Tokens are drawn at random with one seed, the same for all: a
small model that is greedy repeats itself under the full cache too. Exit code 1 where a policy fails.

A policy runs at the sizes that it ships with, halved until something is dropped. Where it then babbles, it runs again
with its sizes doubled, as often as something is still dropped: whether it is the loss that the model cannot bear, or
something that is broken, shows there. Its line tells both.

What counts as babble, against the full cache on the same prompt: one token again and again for more than twice the full
cache's longest run (and at least RUN tokens), or less than half of its variety in the newest half of the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvpolicy.errors import KvpolicyError
from kvpolicy.language import Policy, load_policy, shipped_policies
from kvpolicy.models import load_model
from kvpolicy.models.builtin import DEMO
from kvpolicy.models.tiny.task import make_problem
from kvpolicy.patching import apply, cache_for, compile_report, remove
from kvpolicy.plan import ModelGeometry, make_plan, unsupported
from kvpolicy.plan.timeline import timeline
from kvpolicy.runtime.stepping import Stepper

RUN = 16
"""So many times the same token in a row are no babble yet."""

SCALED = 64
"""Params of at least so many tokens are sizes, and are halved until a policy has something to drop."""

HALVINGS = 6
DOUBLINGS = 3
REFERENCE = "dense"
COMPILE: dict[str, bool | str] = {"inductor": True, "eager": "eager", "no": False}


@dataclass(frozen=True)
class Row:
    """What came of one policy. ``status``: ok, failed or refused; ``why`` says what was wrong.

    moved: tokens that went on to another pool. longest_run: the most times in a row that one token was said. variety:
    different tokens in the newest half.
    """

    policy: str
    digest: str
    model: str
    tokens: int
    seed: int
    compile: str
    status: str
    why: str
    settings: dict[str, str]
    evicted: int = 0
    moved: int = 0
    resident: int = 0
    graphs: int = 0
    recompiles: int = 0
    longest_run: int = 0
    variety: int = 0
    seconds: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a line of an earlier run good enough for this one."""
        return self.digest, self.model, self.tokens, self.seed, self.compile


@dataclass(frozen=True)
class Setting:
    """The model, the prompt [1, P], and how long to write."""

    model: Any
    name: str
    prompt: torch.Tensor
    tokens: int
    seed: int
    compile: bool | str

    def row(self, policy: Policy, status: str, why: str = "", small: Policy | None = None, **more: Any) -> Row:
        """A row of a policy, which ran with the params of ``small``."""
        digest, how = policy.digest, str(self.compile)
        settings = {name: param.value.text for name, param in (small or policy).params.items()}
        return Row(policy.name, digest, self.name, self.tokens, self.seed, how, status, why, settings, **more)


def busy(policy: Policy, geometry: ModelGeometry, prompt: int, tokens: int) -> Policy:
    """The policy with its sizes halved until it drops tokens of such a text, or leaves some unread.

    Where no halving is accepted or comes to that, as for the full cache, the policy as it is.
    """
    sizes = {
        name: int(param.value.constant)
        for name, param in policy.params.items()
        if param.value.constant is not None and param.value.constant >= SCALED
    }
    for halving in range(HALVINGS):
        try:
            smaller = policy.bind(**{name: value >> halving for name, value in sizes.items()}) if halving else policy
        except KvpolicyError:
            continue
        if leaves_out(smaller, geometry, prompt, tokens):
            return smaller
    return policy


def roomier(policy: Policy, geometry: ModelGeometry, prompt: int, tokens: int) -> Iterator[Policy]:
    """The policy with its sizes doubled, and doubled again, as long as it still leaves something out."""
    for doubling in range(1, DOUBLINGS + 1):
        sizes = {
            name: f"{1 << doubling} * ({param.value.text})"
            for name, param in policy.params.items()
            if param.value.names or (param.value.constant or 0) >= SCALED
        }
        try:
            larger = policy.bind(**sizes)
        except KvpolicyError:
            return
        if not sizes or not leaves_out(larger, geometry, prompt, tokens):
            return
        yield larger


def leaves_out(policy: Policy, geometry: ModelGeometry, prompt: int, tokens: int) -> bool:
    """Whether it drops tokens of such a text, or leaves some unread; not where it has no plan."""
    try:
        plan = make_plan(policy, geometry, prompt=prompt, max_new_tokens=tokens)
    except KvpolicyError:
        return False
    selects = any(
        pool.read is not None and (pool.read.top.constant or 0) < prompt
        for layer in plan.layers
        for pool in layer.pools
    )
    return selects or any(line.evicted for layer in plan.layers for line in timeline(plan, layer))


@torch.no_grad()
def write(setting: Setting, policy: Policy, sized: Policy | None = None) -> Row:
    """One policy's text, step by step through the project's own loop; ``sized``: with other sizes than `busy`'s."""
    model, (prompt, tokens) = setting.model, (setting.prompt, setting.tokens)
    geometry = ModelGeometry.from_config(model.config)
    small = sized or busy(policy, geometry, prompt.shape[1], tokens)
    refused = list(
        dict.fromkeys(unsupported(make_plan(small, geometry, prompt=prompt.shape[1], max_new_tokens=tokens)))
    )
    if refused:
        return setting.row(policy, "refused", "; ".join(refused), small)
    started, generator = time.monotonic(), torch.Generator().manual_seed(setting.seed)
    apply(model, small, compile=setting.compile)
    try:
        cache = cache_for(model, prompt=prompt.shape[1], max_new_tokens=tokens)
        logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        stepper, said, finite = Stepper(model, cache), list[int](), True
        for _ in range(tokens):
            finite = finite and bool(logits.isfinite().all())
            token = torch.multinomial(logits.float().softmax(-1).nan_to_num(0.0) + 1e-12, 1, generator=generator)
            said.append(int(token))
            logits = stepper.step(token)
        report, stats = compile_report(model), cache.stats()
    finally:
        remove(model)
        torch._dynamo.reset()
    wrong = [] if finite else ["logits that are no numbers"]
    wrong += [f"{report.recompiles} recompiles"] * bool(report.recompiles)
    wrong += [f"{report.graph_breaks} graph breaks"] * bool(report.graph_breaks)
    return setting.row(
        policy,
        "failed" if wrong else "ok",
        "; ".join(wrong),
        small,
        evicted=stats["evicted"],
        moved=sum(counts["moved"] for counts in stats["pools"].values()),
        resident=stats["resident"],
        graphs=report.graphs,
        recompiles=report.recompiles,
        longest_run=longest_run(said),
        variety=len(set(said[tokens // 2 :])),
        seconds=round(time.monotonic() - started, 1),
    )


def longest_run(said: Sequence[int]) -> int:
    """The most times in a row that one token was said."""
    longest = run = 0
    for at, token in enumerate(said):
        run = run + 1 if at and token == said[at - 1] else 1
        longest = max(longest, run)
    return longest


def attempted(setting: Setting, policy: Policy, sized: Policy | None = None) -> Row:
    """``write``, where a fault is a row too: one policy's must not end a night's run for the others."""
    try:
        return write(setting, policy, sized)
    except Exception as fault:
        reason = str(fault).strip().partition("\n")[0]
        return setting.row(policy, "failed", f"{type(fault).__name__}: {reason}")


def judged(row: Row, full: Row) -> Row:
    """The row, failed where it babbles and the full cache does not."""
    wrong = [row.why] if row.status == "failed" else []
    if row.longest_run > max(RUN, 2 * full.longest_run):
        wrong.append(f"the same token {row.longest_run} times in a row (under the full cache {full.longest_run})")
    if row.seconds and 2 * row.variety < full.variety:
        wrong.append(f"{row.variety} different tokens in the newest half (under the full cache {full.variety})")
    if row.status == "refused" or not wrong:
        return row
    return replace(row, status="failed", why="; ".join(wrong))


def run(setting: Setting, names: Sequence[str], earlier: Sequence[Row] = ()) -> Iterator[Row]:
    """Rows of policies as they are done, the full cache's first; those of ``earlier`` that still hold are taken."""
    known = {row.key: row for row in earlier if row.status == "ok"}
    full: Row | None = None
    for name in (REFERENCE, *(name for name in names if name != REFERENCE)):
        policy = load_policy(name)
        row = known.get(setting.row(policy, "").key) or attempted(setting, policy)
        full = full or row
        verdict = judged(row, full)
        yield verdict if row.status != "ok" or verdict.status == "ok" else again(setting, policy, verdict, full)


def again(setting: Setting, policy: Policy, babble: Row, full: Row) -> Row:
    """A policy that babbles, with more room; what it did at its own sizes stays in the row."""
    geometry, prompt = ModelGeometry.from_config(setting.model.config), setting.prompt.shape[1]
    for larger in roomier(policy, geometry, prompt, setting.tokens):
        row = judged(attempted(setting, policy, larger), full)
        if row.status == "ok":
            return replace(row, why=f"at its own sizes: {babble.why}")
    return babble


def prompt_for(spec: str, tokenizer: Any) -> torch.Tensor:
    """A text that the model has something to say to [1, P].

    The tiny model's answer has begun: before that, nothing tells which words of the prompt will be wanted.
    """
    problem = make_problem(0, hums=200)
    begun = " ".join([problem.prompt, *problem.answer(3 * len(problem.phrase))])
    text = begun if spec == "builtin:tiny" else DEMO.read_text(encoding="utf-8")
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


def read(path: Path) -> list[Row]:
    """The rows of an earlier run. A last line that was cut short is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """One more line, of its own also where the last one was cut short."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(asdict(row)) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Write, judge and tell; 1 where a policy failed, or is refused by the runtime."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.lab.long_run", description=__doc__)
    parser.add_argument("policies", nargs="*", help="names or files; default: every shipped one")
    parser.add_argument("--model", default="builtin:tiny", help="what apply takes")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", choices=COMPILE, default="inductor")
    parser.add_argument("--out", type=Path, default=Path("build/long_run.jsonl"), help="lines of JSON; read to go on")
    given = parser.parse_args(arguments)
    model, tokenizer = load_model(given.model, notify=lambda line: print(line, file=sys.stderr))
    prompt = prompt_for(given.model, tokenizer)
    setting = Setting(model, given.model, prompt, given.tokens, given.seed, COMPILE[given.compile])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    names = given.policies or list(shipped_policies())
    rows: list[Row] = []
    earlier = read(given.out)
    for at, row in enumerate(run(setting, names, earlier), 1):
        rows.append(row)
        if row not in earlier:
            append(given.out, row)
        told = f"{row.evicted:,} left, {row.resident:,} stay, {row.graphs} graphs, {row.seconds:.0f} s"
        told = ": ".join(filter(None, (told * (row.status == "ok"), row.why)))
        print(f"[{at}/{len({REFERENCE, *names})}] {row.policy:30} {row.status:8} {told}", flush=True)
    bad = [row.policy for row in rows if row.status != "ok"]
    print(
        f"{len(rows) - len(bad)} of {len(rows)} policies wrote {given.tokens:,} tokens"
        + f"; not {', '.join(bad)}" * bool(bad)
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
