"""Whether kernels are right on this machine: their own tests, in a checkout, and policies beside the oracle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import kvpolicy
from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.budgets import with_budget
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.plan import ModelGeometry, make_plan, unsupported
from kvpolicy.testing.agreement import Disagreement
from kvpolicy.testing.beside import Beside

SHAPE = ModelGeometry("random", layers=2, query_heads=8, kv_heads=2, head_dim=64)
PROMPT, BUDGET, STEPS = 16, 64, 96
TESTS = Path(kvpolicy.__file__).parents[1] / "tests" / "attention"


@dataclass
class Check:
    """One thing that was checked: ``right`` is None where it could not be. ``said``: how, and what was found."""

    name: str
    right: bool | None
    said: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kernel_tests(seconds: float) -> Check:
    """`pytest -m gpu` over the tests of the kernels, which lie beside the package in a checkout."""
    start, name = time.monotonic(), "tests of every kernel"

    def check(right: bool | None, said: str) -> Check:
        return Check(name, right, said, time.monotonic() - start)

    if not TESTS.is_dir():
        return check(None, "not run: an installed package has no tests; run this from a checkout")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
                   f"--junitxml={report}", str(TESTS)]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        try:
            done = subprocess.run(
                command, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=seconds, env=environment
            )
        except subprocess.TimeoutExpired as late:
            return check(*_so_far(late.stdout or b"", seconds))
        if not report.is_file():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it said nothing"]
            return check(None, f"pytest did not run: {last[0]}")
        return check(*_read(report))


def _so_far(output: bytes | str, seconds: float) -> tuple[bool | None, str]:
    """What the marks say that pytest printed before its time was up."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    marks = "".join(re.findall(r"(?m)^[.FEsx]+", text))
    wrong = marks.count("F") + marks.count("E")
    said = f"not finished after {seconds:.0f} s: {marks.count('.')} passed, {wrong} failed until then"
    return (False if wrong else None), said


def _read(report: Path) -> tuple[bool | None, str]:
    """What a JUnit report says: whether all passed, and how many."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    wrong, ran = count["failures"] + count["errors"], count["tests"] - count["skipped"]
    said = f"pytest -m gpu tests/attention: {ran - wrong} passed, {wrong} failed, {count['skipped']} skipped"
    return (None if ran == 0 else wrong == 0), said


def policies_beside_the_oracle(
    device: torch.device, backend: str, tell: Callable[[str], None], names: list[str] | None = None
) -> Iterator[Check]:
    """Every shipped policy over random queries, keys and values in float32: after each pass the oracle must have kept
    the same tokens. Runs from an installed package as well."""
    for name in names or shipped_policies():
        start = time.monotonic()
        tell(f"{name} beside the oracle")
        try:
            right, said = _beside(name, device, backend)
        except UsageError as refusal:
            right, said = None, str(refusal).splitlines()[0]
        except Disagreement as fault:
            right, said = False, str(fault).splitlines()[0]
        yield Check(f"{name} keeps what the oracle keeps", right, said, time.monotonic() - start)


def _beside(name: str, device: torch.device, backend: str) -> tuple[bool, str]:
    policy = load_policy(name)
    if any(pool.budget for pool in policy.pools.values()):
        policy = with_budget(policy, BUDGET, SHAPE, prompt=PROMPT, max_new_tokens=STEPS).policy
    plan = make_plan(policy, SHAPE, batch=2, prompt=PROMPT, max_new_tokens=STEPS)
    if reasons := list(dict.fromkeys(unsupported(plan))):
        raise UsageError(f"the runtime cannot run {', '.join(reasons)} yet")
    beside = Beside(plan, device=device, backend=backend)
    generator = torch.Generator().manual_seed(0)
    heads = (SHAPE.query_heads, SHAPE.kv_heads, SHAPE.kv_heads)
    for columns in [PROMPT, *[1] * STEPS]:
        given = [
            tuple(torch.randn(2, count, columns, SHAPE.head_dim, generator=generator).to(device) for count in heads)
            for _ in range(SHAPE.layers)
        ]
        beside.feed(given)  # type: ignore[arg-type]
    evicted = beside.cache.stats()["evicted"]
    return True, f"backend {beside.cache.backend}: {STEPS} steps, {evicted:,} tokens evicted"
