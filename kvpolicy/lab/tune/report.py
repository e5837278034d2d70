"""What a search found, as a table, as remarks and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpolicy.lab.fidelity.forcing import BLOCK
from kvpolicy.lab.tune.goal import Tried
from kvpolicy.lab.tune.measured import Measured
from kvpolicy.lab.tune.search import Tuning

COLUMNS = ("memory", "of full", "agreement", "KL", "error", "mass", "settings", "")

FEW = 4
"""Measured settings below which the order of two stages says nothing."""


def table(run: Tuning) -> list[list[str]]:
    """A row for each setting that the model ran, by memory."""
    best = run.front
    return [
        _row(run, tried, "chosen" if tried is run.chosen else "front" if tried in best else "")
        for tried in run.measured
    ]


def _row(run: Tuning, tried: Tried, mark: str) -> list[str]:
    found, kept = tried.found, tried.kept
    return [
        memory(tried.bytes),
        f"{tried.bytes / run.full:.0%}",
        share(found),
        f"{found.kl.value:.2g}",
        "" if kept is None else f"{kept.error:.2g}",
        "" if kept is None else f"{kept.mass:.1%}",
        settings(tried),
        mark,
    ]


def memory(count: int) -> str:
    """Bytes for people, to three digits that count."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def share(found: Measured) -> str:
    """The agreement, with its interval where there are several blocks of places to draw one from."""
    told = found.agreement
    return f"{told.value:.1%}" + (f" ({told.low:.1%} to {told.high:.1%})" if found.blocks > 1 else "")


def settings(tried: Tried) -> str:
    """`heavy=32 recent=8`, or that nothing was set."""
    return " ".join(f"{name}={value}" for name, value in tried.candidate.settings.items()) or "its defaults"


def remarks(run: Tuning) -> Iterator[str]:
    """What was measured by what, how far to believe it, and what to doubt."""
    yield _asked(run)
    yield _stages(run)
    if run.unrecorded:
        yield f"Nothing was recorded, and settings were run in the order of drawing: {run.unrecorded}."
    yield from _order(run)
    for tried in run.tried:
        if tried.refused:
            yield f"{settings(tried)} cannot run: {tried.refused}"
    if run.chosen is not None:
        yield from _doubts(run, run.chosen)


def _asked(run: Tuning) -> str:
    (least, most), new = run.lengths.prompt, run.lengths.new_tokens
    prompts = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    count = len(run.texts)
    said = f"{count} text{'s' if count > 1 else ''}, {prompts} tokens of prompt and at most {new:,} after it"
    return f"{said}; the full cache takes {memory(run.full)} a row."


def _stages(run: Tuning) -> str:
    played = sum(tried.kept is not None for tried in run.tried)
    seconds = {stage: f"{spent:,.0f} s" for stage, spent in run.seconds.items()}
    recorded = (
        f"{played} settings were played on recorded attention ({run.played:,} generated tokens, layers "
        f"{', '.join(map(str, run.recorded))}; error and mass, {seconds['recorded attention']}), and "
        if played
        else ""
    )
    ran = f"{len(run.measured)} ran on the model (agreement and KL, {seconds['the model']})."
    return recorded + ran


def _order(run: Tuning) -> Iterator[str]:
    if sum(tried.kept is not None for tried in run.measured) < FEW:
        return
    agreement, kl = run.correlation("agreement"), run.correlation("kl")
    if kl is None:
        yield "The order of the two stages cannot be compared: all that ran was alike."
        return
    also = "" if agreement is None else f", with that of the agreement {agreement:+.2f}"
    yield (
        f"Rank correlation of the recorded error with the model's KL: {kl:+.2f}{also} (over the {len(run.measured)} "
        "that ran; 1 is the same order)."
    )


def _doubts(run: Tuning, chosen: Tried) -> Iterator[str]:
    if not chosen.found.evicted:
        yield "NOTHING WAS EVICTED under what was chosen: at these lengths it is the full cache."
    if chosen.bytes > run.full:
        yield "What was chosen takes more memory than the full cache, for its notes about tokens."
    if run.goal.agreement is not None and chosen.found.agreement.low < run.goal.agreement:
        yield (
            f"On other texts the agreement may be as low as {chosen.found.agreement.low:.1%}: the interval reaches "
            "below what was asked for; more texts make it narrower."
        )
    if chosen.found.blocks < 2:
        yield f"There are no intervals: {chosen.found.places} places are one block of {BLOCK}; take more text."
    if len(run.measured) > 1:
        yield (
            "It was chosen on the texts it was measured on, which flatters it a little: check it on others with "
            "kvpolicy compare --tasks fidelity --dataset FILE."
        )


def to_dict(run: Tuning) -> dict[str, Any]:
    """All of it."""
    best = run.front
    return {
        "policy": run.policy.name,
        "digest": run.policy.digest,
        "model": run.model,
        "device": run.device,
        "dtype": run.dtype,
        "goal": {"memory": run.goal.memory, "agreement": run.goal.agreement},
        "seed": run.options.seed,
        "texts": [{"name": name, "prompt": prompt, "new_tokens": new} for name, prompt, new in run.texts],
        "prompt": list(run.lengths.prompt),
        "new_tokens": run.lengths.new_tokens,
        "full_bytes": run.full,
        "searched": {
            axis.name: {"kind": axis.kind, "size": axis.size, "values": [axis.spelled(value) for value in axis.values]}
            for axis in run.space.axes
        },
        "left": dict(run.space.left),
        "recorded": {"layers": list(run.recorded), "tokens": run.played, "why_not": run.unrecorded},
        "trials": [_facts(tried, tried in best, tried is run.chosen) for tried in run.tried],
        "front": [tried.candidate.number for tried in best],
        "chosen": None if run.chosen is None else _facts(run.chosen, run.chosen in best, True),
        "rank_correlation": {"kl": run.correlation("kl"), "agreement": run.correlation("agreement")},
        "seconds": run.seconds,
        "versions": run.versions,
    }


def _facts(tried: Tried, best: bool, chosen: bool) -> dict[str, Any]:
    kept, found = tried.kept, tried.measured
    return {
        "number": tried.candidate.number,
        "settings": tried.candidate.settings,
        "digest": tried.candidate.policy.digest,
        "bytes": tried.bytes,
        "recorded": None if kept is None else {"error": kept.error, "mass": kept.mass, "tokens": kept.tokens},
        "measured": None
        if found is None
        else {
            "agreement": found.agreement.to_dict(),
            "kl": found.kl.to_dict(),
            "bytes": found.bytes,
            "evicted": found.evicted,
            "places": found.places,
            "blocks": found.blocks,
        },
        "refused": tried.refused,
        "front": best,
        "chosen": chosen,
    }
