"""The pytest plugin: policies' own tests as items, and the fixture ``run_policy``.

pytest loads this file in every project that has kvpolicy installed, so it imports nothing heavy, and collects nothing
that was not asked for: policies that are named on the command line, and files that the ini option ``kvpolicy_files``
matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvpolicy.language import Policy
    from kvpolicy.testing.asserting import PolicyRun
    from kvpolicy.testing.runner import Outcome

SUFFIXES = (".yaml", ".yml")
POLICY = re.compile(r"""^(["']?)kvpolicy\1\s*:""", re.MULTILINE)
FILES = pytest.StashKey[frozenset[Path]]()
"""What the project says are policies."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("kvpolicy_files", "glob patterns, from the root folder, of policies whose tests are run", "args", [])
    group = parser.getgroup("kvpolicy", "tests of KV-cache policies")
    group.addoption("--kvpolicy-runtime", action="store_true", help="run policies on the torch runtime too")
    group.addoption("--kvpolicy-compile", action="store_true", help="the same with compiled steps (many seconds)")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix in SUFFIXES and (_matched(file_path, parent.config) or _named(file_path, parent.session)):
        return PolicyFile.from_parent(parent, path=file_path)
    return None


def _matched(path: Path, config: pytest.Config) -> bool:
    """Whether the project says that this file is a policy."""
    if FILES not in config.stash:
        patterns, root = config.getini("kvpolicy_files"), config.rootpath
        found = (file for pattern in patterns for file in glob(pattern, root_dir=root, recursive=True))
        config.stash[FILES] = frozenset(root / file for file in found)
    return path in config.stash[FILES]


def _named(path: Path, session: pytest.Session) -> bool:
    """Whether the command line names this file, and it has the key that all policies have."""
    return session.isinitpath(path) and bool(POLICY.search(path.read_text(encoding="utf-8-sig", errors="replace")))


class PolicyFile(pytest.File):
    """A policy; each of its tests is an item."""

    def collect(self) -> Iterator[pytest.Item]:
        from kvpolicy.errors import PolicyError
        from kvpolicy.language import load_policy

        try:
            policy = load_policy(self.path)
        except PolicyError as error:
            raise self.CollectError(str(error)) from None
        for number, test in enumerate(policy.tests):
            yield PolicyItem.from_parent(self, name=test.name, policy=policy, number=number)


class ClaimFailed(Exception):
    """A claim of a policy's test that does not hold."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(str(outcome))


class PolicyItem(pytest.Item):
    """One test of a policy."""

    def __init__(self, *, policy: Policy, number: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.policy, self.number = policy, number

    def runtest(self) -> None:
        from kvpolicy.testing.runner import run_test

        outcome = run_test(self.policy, self.number, **_asked(self.config))
        if not outcome.passed:
            raise ClaimFailed(outcome)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from kvpolicy.errors import KvpolicyError
        from kvpolicy.testing.agreement import Disagreement

        if isinstance(excinfo.value, ClaimFailed | KvpolicyError | Disagreement):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        from kvpolicy.language.base import Complaint

        line = self.policy.diagnostic(("tests", self.number), Complaint("")).line
        return self.path, line - 1, f"{self.policy.name}: {self.name}"


def _asked(config: pytest.Config) -> dict[str, bool]:
    """What policies are run on."""
    return {"runtime": config.getoption("--kvpolicy-runtime"), "compiled": config.getoption("--kvpolicy-compile")}


@pytest.fixture(scope="session")
def run_policy(pytestconfig: pytest.Config) -> Callable[..., PolicyRun]:
    """Run a policy on a text: ``run_policy("raas", {"pattern": "sink", "steps": 64}, budget=64).resident(max=64)``.

    See ``kvpolicy.testing.asserting.run_policy``; ``runtime`` and ``compiled`` are by default what the command line
    says.
    """
    from kvpolicy.testing.asserting import run_policy

    def run(policy: Policy | str | Path, attention: Mapping[str, Any], /, **settings: Any) -> PolicyRun:
        __tracebackhide__ = True
        return run_policy(policy, attention, **{**_asked(pytestconfig), **settings})

    return run
