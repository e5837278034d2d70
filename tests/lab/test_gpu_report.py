"""The report for a GPU, tried on a CPU: every job's way through, what is skipped or fails, and what is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvpolicy.lab import gpu_report
from kvpolicy.lab.gpu import checks
from kvpolicy.lab.gpu.jobs import JOBS, SMALL, Job, Session, Sizes
from kvpolicy.lab.gpu.targets import COLUMNS, Outcome

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.slow
def test_a_dry_run_goes_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main(["--dry-run", "--seconds", "3600", "--output", str(tmp_path / "found")]) == 0
    told = json.loads((tmp_path / "found" / "report.json").read_text())
    assert [check["right"] for check in told["checks"]] == [True]
    assert len(told["targets"]) == 22 and all(target["measured"] for target in told["targets"])
    assert not [target for target in told["targets"] if "failed" in target["note"] or "skipped" in target["note"]]
    assert told["capacities"][1]["batch"] > 5 * told["capacities"][0]["batch"]
    policies = [row for row in told["report"]["rows"] if row["arm"] == "policy"]
    assert policies and all(row["evicted"] > 0 for row in policies)
    assert (tmp_path / "found" / "report.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "times say nothing" in out and "| sequences that fit at 512 tokens |" in out


def test_a_short_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One job that times nothing, one for which there is no time: what is written, and what is said."""
    monkeypatch.setattr(gpu_report, "JOBS", [job for job in JOBS if job.name == "sequences that fit"] + [JOBS[0]])
    assert gpu_report.main(["--dry-run", "--seconds", "100", "--output", str(tmp_path)]) == 0
    fits, skipped = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert fits["ideal"] == 8 and 6 < fits["measured"] <= 8 and "planned" in fits["note"]
    assert skipped["measured"] is None and "skipped: it takes about 150 s" in skipped["note"]
    assert "right  window keeps what the oracle keeps" in capsys.readouterr().out


@NO_GPU
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: this report needs an NVIDIA GPU") and err.count("\n") == 1


def session() -> Any:
    return SimpleNamespace(track=SimpleNamespace(forget=lambda: None))


def good(session: Session) -> Iterator[Outcome]:
    yield Outcome("good", 1.0, 0.9, 0.95)


def bad(session: Session) -> Iterator[Outcome]:
    yield Outcome("before", 1.0, None, 2.0)
    raise RuntimeError("out of luck\nand more")


def test_a_job_that_fails_or_takes_too_long_does_not_stop_the_others() -> None:
    jobs = [Job("broken", 1, bad), Job("too long", 1e6, good), Job("fine", 1, good)]
    found = list(gpu_report.outcomes(session(), jobs, gpu_report.Clock(100)))
    assert [outcome.test for outcome in found] == ["before", "broken", "too long", "good"]
    assert found[1].note == "failed: RuntimeError: out of luck" and found[2].note.startswith("skipped: it takes about")
    assert [outcome.met for outcome in found] == [None, None, None, True]


def test_the_jobs_fit_into_ten_minutes() -> None:
    assert sum(job.seconds for job in JOBS) + 600 * gpu_report.CHECKING <= 615


def test_sizes_are_those_of_the_targets_and_of_a_try() -> None:
    whole = Sizes()
    assert (whole.budget, whole.short, whole.long, whole.longest) == (2048, 4096, 32_768, 131_072)
    assert SMALL.budget < SMALL.short < SMALL.long < SMALL.longest <= 1024


@pytest.mark.parametrize(("measured", "met", "cell"), [(0.949, False, "NO"), (0.95, True, "yes"), (None, None, "–")])
def test_a_target_is_met_at_its_least(measured: float | None, met: bool | None, cell: str) -> None:
    outcome = Outcome("t", 1.0, 0.95, measured)
    assert outcome.met is met and outcome.to_dict()["met"] is met
    assert len(outcome.cells()) == len(COLUMNS) and outcome.cells()[4] == cell


# Checks


@pytest.mark.parametrize(
    ("counts", "right", "said"),
    [
        ('tests="9" failures="0" errors="0" skipped="2"', True, "7 passed, 0 failed, 2 skipped"),
        ('tests="9" failures="1" errors="1" skipped="0"', False, "7 passed, 2 failed"),
        ('tests="3" failures="0" errors="0" skipped="3"', None, "0 passed"),
    ],
)
def test_what_pytest_says_of_the_kernels(counts: str, right: bool | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite {counts}/></testsuites>")
    found = checks._read(tmp_path / "r.xml")
    assert found[0] is right and said in found[1]


def test_kernel_tests_that_take_too_long_say_how_far_they_came() -> None:
    assert checks._so_far(b"..s.\n...   [ 10%]\nbla", 9) == (
        None,
        "not finished after 9 s: 6 passed, 0 failed until then",
    )
    assert checks._so_far("..F.", 9)[0] is False
    assert checks._so_far(b"", 9)[0] is None


def test_without_a_checkout_kernel_tests_are_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "TESTS", tmp_path / "tests" / "attention")
    found = checks.kernel_tests(10)
    assert found.right is None and "checkout" in found.said


def test_a_policy_beside_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime keeps is checked: one that forgets to evict is found out."""
    monkeypatch.setattr(checks, "BUDGET", 24)
    monkeypatch.setattr(checks, "STEPS", 16)
    device = torch.device("cpu")
    (right,) = checks.policies_beside_the_oracle(device, "torch", lambda text: None, ["tova"])
    assert right.right is True and "16 steps, 64 tokens evicted" in right.said
    monkeypatch.setattr("kvpolicy.runtime.cache.PolicyCache._update_due", lambda self: False)
    (wrong,) = checks.policies_beside_the_oracle(device, "torch", lambda text: None, ["tova"])
    assert wrong.right is False
