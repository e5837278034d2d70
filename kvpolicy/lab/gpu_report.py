"""One command for a GPU: are the kernels right, and what do they give. At most ten minutes on one H200; no network.

    python -m kvpolicy.lab.gpu_report             the report, in a folder named after the date
    python -m kvpolicy.lab.gpu_report --dry-run   the same way through on a CPU, with a tiny model; times say nothing

First every kernel: its tests where they lie beside the package, as in a checkout, and every shipped policy beside the
oracle, which an installed package can do as well. Then the targets, in Llama-3.1-8B's shape with random weights in
bfloat16; ratios are taken between arms that took turns in one process. What the time does not reach is named. The
folder gets report.json and report.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvpolicy.errors import KvpolicyError, UsageError
from kvpolicy.lab.bench.counting import kernels_visible
from kvpolicy.lab.bench.environment import environment
from kvpolicy.lab.bench.models import random_model
from kvpolicy.lab.bench.picture import picture
from kvpolicy.lab.bench.racing import Track
from kvpolicy.lab.bench.rows import Report
from kvpolicy.lab.chart import require_matplotlib
from kvpolicy.lab.gpu.checks import Check, kernel_tests, policies_beside_the_oracle
from kvpolicy.lab.gpu.jobs import JOBS, SMALL, Job, Session, Sizes
from kvpolicy.lab.gpu.targets import COLUMNS, Outcome
from kvpolicy.models import load_model

SHAPE = "llama-3.1-8b"
CHECKING = 0.3
"""The share of the time that the tests of the kernels may take."""


class Clock:
    """How much of the time is left."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.monotonic()

    @property
    def gone(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.gone


def tell(text: str) -> None:
    """Say on stderr what is being done; turns of arms are not told one by one."""
    if ": round" not in text:
        print(f"  {text}", file=sys.stderr, flush=True)


def checks(device: torch.device, clock: Clock, dry: bool) -> Iterator[Check]:
    """Every kernel. In a dry run there are none: a policy on the torch backend stands in, so that the way is tried."""
    if dry:
        yield from policies_beside_the_oracle(device, "torch", tell, ["window"])
        return
    tell("tests of the kernels")
    yield kernel_tests(CHECKING * clock.seconds)
    yield from policies_beside_the_oracle(device, "triton", tell)


def outcomes(session: Session, jobs: Sequence[Job], clock: Clock) -> Iterator[Outcome]:
    """The targets, job by job; one that fails or does not fit into the time says so, and the next one runs."""
    for job in jobs:
        if job.seconds > clock.left:
            yield Outcome(
                job.name, None, None,
                note=f"skipped: it takes about {job.seconds:.0f} s, and {max(0, clock.left):.0f} s are left",
            )  # fmt: skip
            continue
        tell(f"{job.name}, {clock.gone:.0f} s gone")
        failed = ""
        try:
            yield from job.run(session)
        except Exception as fault:  # whatever it is, the jobs behind it may still tell something
            failed = f"failed: {type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}"
        if failed:  # only here has the fault let go of the arms that were running
            session.track.forget()
            yield Outcome(job.name, None, None, note=failed)


@torch.no_grad()
def report(device: torch.device, sizes: Sizes, seconds: float, dry: bool) -> dict[str, Any]:
    """Checks, targets and rows, as plain data; ``picture`` is the PNG's bytes, None without matplotlib."""
    clock = Clock(seconds)
    checked = list(checks(device, clock, dry))
    tell("making the model")
    model = load_model("builtin:tiny", device=device)[0] if dry else random_model(SHAPE, device=device)
    track = Track(model, steps=sizes.steps, rounds=sizes.rounds, compile=not dry, backend="auto", count=True, tell=tell)
    session = Session(track, sizes)
    with kernels_visible():
        found = list(outcomes(session, JOBS, clock))
    name = "builtin:tiny (dry run: times say nothing)" if dry else f"{SHAPE}, random weights, bfloat16"
    rows = Report(name, track.device_name, track.bandwidth, track.weights, track.model_bytes, session.rows)
    rows.environment = environment(device)
    return {
        "dry_run": dry,
        "seconds": clock.gone,
        "checks": [check.to_dict() for check in checked],
        "targets": [outcome.to_dict() for outcome in found],
        "capacities": session.capacities,
        "report": rows.to_dict(),
        "table": _markdown(found),
        "picture": _picture(rows),
    }


def _picture(rows: Report) -> bytes | None:
    try:
        require_matplotlib("report.png")
    except KvpolicyError as missing:
        tell(str(missing))
        return None
    return picture(rows)


def _markdown(found: Sequence[Outcome]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(lines + [f"| {' | '.join(outcome.cells())} |" for outcome in found])


def write(told: dict[str, Any], folder: Path) -> None:
    """Put report.json and report.png into a folder. Raises UsageError."""
    drawn = told.pop("picture")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")
        if drawn is not None:
            (folder / "report.png").write_bytes(drawn)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; give another --output") from None


def show(told: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    where = told["report"]["environment"]
    yield f"{told['report']['model']} on {where['device']}, torch {where['torch']}, {where['date']}"
    for check in told["checks"]:
        yield f"{ {None: '  –  ', True: 'right', False: 'WRONG'}[check['right']] }  {check['name']}: {check['said']}"
    yield told["table"]
    yield f"{told['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """0: all is right and every target that was measured is met; 1: not; 2: there is nothing to run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for report.json and report.png")
    parser.add_argument("--seconds", type=float, default=600, help="time that all of it may take (600)")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU with a tiny model; its times say nothing")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "error: this report needs an NVIDIA GPU, and torch finds none; --dry-run tries it on a CPU", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    folder = options.output or Path(f"gpu-report-{today}")
    try:
        told = report(device, SMALL if options.dry_run else Sizes(), options.seconds, options.dry_run)
        write(told, folder)
    except KvpolicyError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    print("\n".join(show(told)))
    print(f"wrote {folder}/report.json", file=sys.stderr)
    wrong = [check for check in told["checks"] if check["right"] is False]
    missed = [target for target in told["targets"] if target["met"] is False or target["note"].startswith("failed")]
    return 1 if (wrong or missed) and not options.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
