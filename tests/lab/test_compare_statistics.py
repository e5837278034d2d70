"""Intervals, paired tests, the front and verdicts, on numbers whose answers are known and on planted rows."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvpolicy.errors import UsageError
from kvpolicy.lab.compare.loops import loop
from kvpolicy.lab.compare.report import Report, report
from kvpolicy.lab.compare.rows import Row, append, read
from kvpolicy.lab.compare.statistics import front, holm, interval, paired
from kvpolicy.lab.compare.tables import as_csv, probability, remarks, tables
from kvpolicy.lab.compare.verdicts import verdicts
from kvpolicy.lab.tasks.registry import task_named

ITEMS = 16
COPY = task_named("copy").make(ITEMS + 2, seed=0, size=75)


def row(label: str, budget: int | None, number: int, right: int, **changes: object) -> Row:
    """A row of the copy task with so many lines right; what is not right was never said."""
    item = COPY[number]
    lines = [f"{name}: {answer}\n" for name, answer in zip(item.names, item.answers, strict=True)]
    told = Row(
        "m", "float32", label, f"digest of {label} {budget}", budget, {}, budget or 99, "copy", 75, 0, number, "p", 99,
        right=tuple(place < right for place in range(len(item.answers))), about=item.about,
        output="".join(lines[:right]), prompt_tokens=60, new_tokens=60, evicted=0 if budget is None else 30,
        bytes=10 * (budget or 200), versions={"kvpolicy": "1"},
    )  # fmt: skip
    return replace(told, **changes)  # type: ignore[arg-type]


def rows(label: str, budget: int | None, right: int | Sequence[int], **changes: object) -> list[Row]:
    each = [right] * ITEMS if isinstance(right, int) else right
    return [row(label, budget, number, count, **changes) for number, count in enumerate(each)]


def told(given: Sequence[Row]) -> tuple[Report, str]:
    found = report(given, {"copy": task_named("copy")})
    return found, "\n".join(verdicts(found, given))


FULL = rows("dense", None, 10)


# Statistics ---------------------------------------------------------------------------------------------------------


def test_one_answer_an_item_is_wilsons_interval() -> None:
    found = interval([(1, 1)] * 8 + [(0, 1)] * 2)
    assert (found.share, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_items_that_stand_or_fall_whole_are_worth_one_answer_each() -> None:
    """A hundred answers in ten items that are all right or all wrong say as much as ten."""
    whole, single = interval([(10, 10)] * 8 + [(0, 10)] * 2), interval([(1, 1)] * 8 + [(0, 1)] * 2)
    assert whole.low == pytest.approx(single.low, abs=0.03) and whole.high == pytest.approx(single.high, abs=0.03)
    even = interval([(8, 10)] * 10)
    assert even.high - even.low < 0.5 * (whole.high - whole.low)


def test_all_right_is_not_certain() -> None:
    found = interval([(12, 12)] * 8)
    assert found.share == found.high == 1 and found.low == pytest.approx(0.6756, abs=1e-3)
    assert interval([(0, 12)] * 8).low == 0
    with pytest.raises(ValueError, match="no answers"):
        interval([])


def test_what_holds_more_than_its_budget_is_named() -> None:
    given = [*FULL, *rows("quest", 20, 9, held=90), *rows("quest", 40, 9, held=90), *rows("h2o", 20, 9)]
    (said,) = (line for line in told(given)[1].splitlines() if "holds more" in line)
    assert said.startswith("copy: quest holds") and said.endswith(": 90 tokens at 20, 90 tokens at 40")


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_intervals_hold_the_true_share(spread: float) -> None:
    """Of 400 drawn samples, whether answers of an item go together or not, at least 91 % hold it."""
    rng, truth, held = np.random.default_rng(1), 0.7, 0
    for _ in range(400):
        shares = np.full(20, truth) if not spread else rng.beta(truth * 4 / spread, (1 - truth) * 4 / spread, 20)
        found = interval([(int(rng.binomial(12, share)), 12) for share in shares])
        held += found.low <= truth <= found.high
    assert held / 400 >= 0.91


def test_the_paired_test_is_exact_for_few() -> None:
    """One answer an item is McNemar's exact test: 6 worse and 0 better is 2 of 2**6."""
    found = paired([0] * 6 + [1] * 4, [1] * 10)
    assert found.p == pytest.approx(2 / 64) and found.difference == pytest.approx(-0.6)
    assert paired([0, 1, 1], [0, 1, 1]).p == 1
    assert paired([0, 1], [1, 0]).p == 1
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([1.0], [])


def test_the_paired_test_is_rarely_wrong() -> None:
    """Where both are alike it speaks up as seldom as it says, also beyond the exact cases."""
    rng = random.Random(2)
    wrong = 0
    for _ in range(200):
        ours, theirs = ([rng.random() for _ in range(16)] for _ in range(2))
        wrong += paired(ours, theirs).p < 0.05
    assert wrong <= 20
    assert paired([0.1 + 0.01 * rng.random() for _ in range(16)], [0.9] * 16).p < 0.001


def test_many_tests_are_corrected() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_front() -> None:
    assert front([(10, 0.5), (20, 0.9), (20, 0.8), (30, 0.9), (5, 0.1)]) == [True, True, False, False, True]
    assert front([(10, 0.5), (10, 0.5)]) == [True, True]


@pytest.mark.parametrize(
    ("text", "allowed", "found"),
    [
        ("a b c d e f g h i j k l m n o p q r", 0, 0),
        ("one two three " * 3, 0, 0),  # too short to be sure
        ("it began well and then " + "red tin " * 12, 0, 2),
        ("no " * 16, 0, 1),
        ("owl red tin sky " * 6, 4, 0),
        ("owl red tin sky " * 6, 3, 4),
        ("owl red " * 12, 4, 2),
        ("", 0, 0),
    ],
)
def test_loops(text: str, allowed: int, found: int) -> None:
    assert loop(text.split(), allowed=allowed) == found


# Reports ------------------------------------------------------------------------------------------------------------


def test_entries_say_what_rows_say() -> None:
    found, said = told(
        [*FULL, *rows("h2o", 32, 4), *rows("h2o", 64, 8), *rows("random", 32, 1), *rows("random", 64, 8)]
    )
    assert [entry.name for entry in found.entries] == [
        "dense",
        "h2o at 32",
        "h2o at 64",
        "random at 32",
        "random at 64",
    ]
    full, small, large, *_ = found.entries
    assert full.score and full.score.share == 1 and full.full is None and full.best
    assert small.score and small.score.share == pytest.approx(0.4) and small.early == pytest.approx(0.8)
    assert small.late == 0 and small.full and small.full.difference == pytest.approx(-0.6)
    assert small.p_holm and small.p_holm < 0.01 and small.control and small.control.difference == pytest.approx(0.3)
    assert small.best and large.best and large.control and large.control.difference == 0
    assert said == ""


def test_a_policy_that_never_evicted_is_not_reported() -> None:
    found, said = told([*FULL, *rows("h2o", 32, 10, evicted=0)])
    entry = found.entries[1]
    assert entry.score is None and entry.full is None and entry.late is None and not entry.best
    assert "copy: h2o at 32 never evicted or skipped a token" in said
    (table,) = tables(found)
    assert "never evicted" in table.rows[1] and not any("100" in cell for cell in table.rows[1])
    assert ",h2o,digest of h2o 32,32,,16,160,,,,,,,,,,," in as_csv(found)


def test_a_policy_that_selects_did_something() -> None:
    found, said = told([*FULL, *rows("quest", 32, 10, evicted=0, unread=True)])
    assert found.entries[1].score is not None and "never" not in said


def test_a_policy_at_work_in_some_texts_only() -> None:
    some = [replace(each, evicted=0) if each.number < 4 else each for each in rows("h2o", 32, 5)]
    assert "h2o at 32 was at work in 12 of 16 texts" in told([*FULL, *some])[1]


def test_scores_that_do_not_move_with_the_budget() -> None:
    noisy = [4 + (number % 2) for number in range(ITEMS)]
    stuck = [*rows("h2o", 32, 4), *rows("h2o", 64, 4)]
    assert "h2o writes the very same at every budget" in told([*FULL, *stuck])[1]
    flat = [*rows("h2o", 32, noisy), *rows("h2o", 64, noisy[::-1])]
    assert "h2o does not move with the budget: from 32 to 64 tokens it gains +0%" in told([*FULL, *flat])[1]
    assert told([*FULL, *rows("h2o", 32, 10), *rows("h2o", 64, 10)])[1] == ""  # as good as the full cache: no room
    assert told([*FULL, *rows("h2o", 32, 4), *rows("h2o", 64, 7)])[1] == ""


def test_scores_that_fall_with_the_budget() -> None:
    falls = [*rows("h2o", 32, 4), *rows("h2o", 64, 8), *rows("h2o", 96, 6)]
    said = told([*FULL, *falls])[1]
    assert "h2o is worse at 96 tokens than at 64, by 20%" in said and "than at 32" not in said


def test_no_better_than_random() -> None:
    beside = [*rows("random", 32, 5), *rows("random", 64, 7)]
    said = told([*FULL, *rows("h2o", 32, 2), *rows("h2o", 64, 7), *beside])[1]
    assert "h2o at 32 is worse than dropping tokens at random, by 30%" in said
    assert "h2o is nowhere better than dropping tokens at random" in said
    assert "random" not in told([*FULL, *rows("h2o", 32, 6), *rows("h2o", 64, 7), *beside])[1]


def test_outputs_that_end_badly() -> None:
    ends = [*rows("h2o", 32, 4, truncated=True), *rows("h2o", 64, 8, looped=True)]
    said = told([*FULL, *ends])[1]
    assert "h2o has more outputs cut off before all was answered than the full cache: 16 of 16 at 32" in said
    assert "h2o has more outputs going round in circles than the full cache: 16 of 16 at 64" in said
    alike = told([replace(each, truncated=True) for each in (*FULL, *rows("h2o", 32, 4))])[1]
    assert "16 of 16 outputs of the full cache were cut off" in alike and "h2o has more" not in alike


def test_a_model_that_cannot_do_the_task() -> None:
    said = told([*rows("dense", None, 0), *rows("h2o", 32, 0)])[1]
    assert "the full cache is right 0% of the time, no more than by chance (0%)" in said
    assert "the full cache itself is right only 40%" in told([*rows("dense", None, 4), *rows("h2o", 32, 2)])[1]
    few = [each for each in (*FULL, *rows("h2o", 32, 4)) if each.number < 4]
    assert "4 items are too few" in told(few)[1]


def test_luck_is_told() -> None:
    """Outputs that are right about the next item's question as well: here they say its lines first."""
    lucky = []
    for each in FULL:
        other = COPY[each.number + 1]
        lines = [f"{name}: {answer}\n" for name, answer in zip(other.names, other.answers, strict=True)]
        lucky.append(replace(each, output="".join(lines[:5]) + each.output))
    found, said = told([*lucky, *rows("h2o", 32, 4)])
    assert found.chance["copy"] == pytest.approx(0.25) and "25% would be right by chance" in said
    assert told([*FULL])[0].chance["copy"] == 0


def test_versions_that_differ_are_told() -> None:
    assert "several versions of kvpolicy: 1, 2" in told([*FULL, *rows("h2o", 32, 4, versions={"kvpolicy": "2"})])[1]


def test_the_full_cache_must_be_there() -> None:
    with pytest.raises(UsageError, match="the full cache has no rows"):
        told(rows("h2o", 32, 4))
    with pytest.raises(UsageError, match="no scored rows"):
        told([replace(each, right=()) for each in FULL])


def test_refusals_are_told_once_for_each_reason() -> None:
    refused = {("copy", "raas", 32): "too small", ("copy", "raas", 64): "too small", ("copy", "h2o", 64): "other"}
    found = report(FULL, {"copy": task_named("copy")}, refused=refused)  # type: ignore[arg-type]
    lines = list(remarks(found, []))
    assert "  copy: raas at 32, 64: too small" in lines and "  copy: h2o at 64: other" in lines


@pytest.mark.parametrize(("p", "words"), [(0.0001, "<.001"), (0.0042, ".004"), (0.25, ".25"), (0.999, "1"), (1.0, "1")])
def test_probabilities_in_words(p: float, words: str) -> None:
    assert probability(p) == words and not math.isnan(p)


# Rows on file -------------------------------------------------------------------------------------------------------


def test_rows_are_kept_and_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read(path) == []
    append(path, FULL[:3])
    append(path, [replace(FULL[1], output="again")])
    assert read(path) == [FULL[0], replace(FULL[1], output="again"), FULL[2]]


def test_an_interrupted_line_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, FULL[:2])
    path.write_text(path.read_text() + '{"kvpolicy_row": 1, "mod')
    assert read(path) == FULL[:2]
    append(path, FULL[2:3])
    assert read(path) == FULL[:3]


@pytest.mark.parametrize(("line", "said"), [("{}", "no row of compare"), ('{"kvpolicy_row": 99}', "version 99")])
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UsageError, match=f"line 1.*{said}"):
        read(path)
