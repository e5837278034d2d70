"""What is said of versions that nobody tested, and how the matrix knows what to run and what came of it."""

import warnings

import pytest

from kvpolicy import versions
from kvpolicy.cli import pages
from kvpolicy.versions import Run, release, untested, warn_untested
from tests.matrix import run as matrix
from tests.matrix.plugin import Told

RUNS = (
    Run("5.2.0", "2.11.0", "3.11", "2026-01-01", True, (), ("llama",)),
    Run("5.4.1", "2.13.0", "3.11", "2026-01-02", False, ("tests/x.py::test[qwen3]",), ("llama",)),
    Run("5.10.0", "2.13.0+cpu", "3.11", "2026-01-03", True, (), ("llama", "qwen3")),
)


@pytest.fixture
def installed(monkeypatch):
    """``installed(transformers=…, torch=…)`` says what is there; RUNS is the record."""
    monkeypatch.setattr(versions, "runs", lambda: RUNS)

    def say(**given):
        monkeypatch.setattr(
            versions, "version", lambda package: {"transformers": "5.10.0", "torch": "2.13.0", **given}[package]
        )
        warn_untested.cache_clear()

    yield say
    warn_untested.cache_clear()


@pytest.mark.parametrize("inside", ["5.2.0", "5.2.9", "5.3.0", "5.10.0", "5.10.7"])
def test_inside_the_tested_range_nothing_is_said(inside, installed):
    installed(transformers=inside)
    assert not list(untested())


@pytest.mark.parametrize(
    ("package", "outside"), [("transformers", "5.1.9"), ("transformers", "5.11.0"), ("transformers", "5.4.0"),
                             ("transformers", "6.0.0.dev0"), ("torch", "2.10.1"), ("torch", "2.14.0+cu130")],
)  # fmt: skip
def test_outside_and_where_tests_failed_apply_warns_once(package, outside, installed):
    installed(**{package: outside})
    with pytest.warns(
        UserWarning, match=rf"{package} {outside[:3]}\S+ is installed, and tests passed on \S+ to "
    ) as told:
        warn_untested()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untested()


def test_apply_warns(installed, monkeypatch):
    import kvpolicy
    from kvpolicy.testing.models import random_model

    installed(torch="3.0.0")
    model = random_model()
    with pytest.warns(UserWarning, match="torch 3.0.0 is installed, and tests passed on 2.11.0 to 2.13.0"):
        kvpolicy.apply(model, "window")
    kvpolicy.remove(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvpolicy.apply(model, "window")


def test_families_are_tested_where_all_of_their_tests_passed(installed):
    assert versions.tested("transformers") == ["5.2.0", "5.10.0"]
    assert versions.tested("transformers", "llama") == ["5.2.0", "5.4.1", "5.10.0"]
    assert versions.tested("transformers", "qwen3") == ["5.10.0"]
    assert release("5.10.0rc1") > release("5.9.2")


def test_the_record_reads_back(tmp_path, monkeypatch):
    """A run takes the place of an older one of the same versions, and the oldest stand first."""
    monkeypatch.setattr(matrix, "RECORD", tmp_path / "matrix.json")
    monkeypatch.setattr(versions, "files", lambda package: tmp_path)
    versions.runs.cache_clear()
    try:
        for new in (*reversed(RUNS), RUNS[1]):
            matrix.write(new)
        versions.runs.cache_clear()
        assert versions.runs() == RUNS
    finally:
        monkeypatch.undo()
        versions.runs.cache_clear()


def test_what_a_session_tells():
    told = Told()
    told.outcomes = {"a[llama]": True, "b[llama]": True, "a[qwen3]": False, "b[qwen3]": True, "c": True}
    told.families = {test: {test[2:-1]} for test in told.outcomes if "[" in test}
    assert told.result() == {"count": 5, "failed": ["a[qwen3]"], "families": ["llama"]}


def test_what_is_run(monkeypatch):
    monkeypatch.setattr(matrix, "oldest", lambda package: {"transformers": "5.2.0", "torch": "2.11.0"}[package])
    offered = ["6.0.0", "5.10.1", "5.10.0", "5.3.2", "5.3.0", "5.2.0", "5.1.0", "4.57.0"]
    monkeypatch.setattr(matrix, "released", lambda package: offered)
    assert matrix.minors("transformers") == ["5.2.0", "5.3.2", "5.10.1"]


def test_the_floors_are_stated_where_pip_reads_them():
    assert release(matrix.oldest("transformers"))[0] == 5
    assert release(matrix.oldest("torch")) <= release(matrix.pinned("torch"))


def test_the_table(installed, monkeypatch):
    monkeypatch.setattr(pages, "runs", lambda: RUNS)
    assert pages.tested_versions().splitlines() == [
        "| transformers | torch 2.11.0 | torch 2.13.0 | torch 2.13.0+cpu |",
        "| --- | --- | --- | --- |",
        "| 5.2.0 | passed, 1 model types (Python 3.11; 2026-01-01) | not tested | not tested |",
        "| 5.4.1 | not tested | 1 tests failed (Python 3.11; 2026-01-02) | not tested |",
        "| 5.10.0 | not tested | not tested | passed, 2 model types (Python 3.11; 2026-01-03) |",
    ]
