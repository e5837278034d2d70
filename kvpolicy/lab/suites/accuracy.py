"""Experiments that count right answers, of policies at budgets or along one of their params. Rows are compare's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from kvpolicy.lab.bench.tables import Table
from kvpolicy.lab.compare import rows as row_files
from kvpolicy.lab.compare.arms import FULL, Arm
from kvpolicy.lab.compare.curves import point
from kvpolicy.lab.compare.report import Entry, Report, controls, report
from kvpolicy.lab.compare.rows import Row
from kvpolicy.lab.compare.running import Run
from kvpolicy.lab.compare.statistics import interval
from kvpolicy.lab.compare.tables import percent, refusals, tables
from kvpolicy.lab.compare.verdicts import verdicts
from kvpolicy.lab.panels import Panel, dressed
from kvpolicy.lab.suites.arms import series
from kvpolicy.lab.suites.base import Experiment, Found, Lab, Rows, Tell
from kvpolicy.lab.suites.claims import Finding, Kind, Spread, Word, all_of, any_of, counted, judge, spread
from kvpolicy.lab.tasks.registry import task_named

LATE = 0.25
"""The part of the answers asked for last that counts as late."""

ABLE = 0.5
"""Below this share of right answers of the full cache nothing is said of policies."""


@dataclass(frozen=True)
class Axis:
    """What varies: tokens of budget, or a param. ``of_prompt``: told as a share of the longest prompt."""

    param: str | None = None
    across: str = "budget (tokens)"
    of_prompt: bool = False

    def place(self, settings: Mapping[str, str], budget: int | None, prompt: int) -> float | None:
        """Where an arm stands; None: nowhere, as the full cache."""
        if self.param is None:
            return budget
        if self.param not in settings:
            return None
        return float(settings[self.param]) / (prompt if self.of_prompt else 1)

    def words(self, value: float) -> str:
        if self.of_prompt or (0 < value < 1 and self.param != "alpha"):
            return f"{100 * value:.0f} %"
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"


BUDGETS = Axis()


@dataclass(frozen=True)
class Claim:
    """What a paper says of two series, see ``claims.Kind``.

    theirs: a series, or the full cache. every: at each place; else at some place. late: of the late answers alone.
    able: right answers that the full cache must give before anything is said.
    """

    says: str
    kind: Kind
    ours: str
    theirs: str = FULL
    every: bool = True
    where: str | None = None
    at: Callable[[float, int], bool] | None = None
    late: bool = False
    able: float = ABLE

    def judged(self, found: Marks) -> Finding:
        """What rows say of it."""
        whole = mean(row.share for row in found.full)
        if whole < self.able:
            reason = f"The full cache itself is right only {whole:.0%} of the time"
            return Finding(self.says, Word.OPEN, f"{reason}; {self.able:.0%} are needed to speak of policies.")
        told = list(found.differences(self.ours, self.theirs, self.late))
        if self.at is not None:
            told = [each for each in told if self.at(each[0], found.prompt)]
        if self.where is not None:
            near = {place: judge(Kind.NEAR, each) for place, each in found.differences(self.where, FULL, False)}
            only = next((place for place, word in near.items() if word is Word.HOLDS), max(near, default=None))
            told = [each for each in told if each[0] == only]
        if not told:
            return Finding(self.says, Word.OPEN, f"{self.ours} did not run beside {self.theirs} anywhere here.")
        words = [judge(self.kind, each) for _, each in told]
        word = (all_of if self.every else any_of)(words)
        late = " (late answers)" if self.late else ""
        against = "the full cache" if self.theirs == FULL else self.theirs
        places = "; ".join(f"{found.axis.words(place)}: {each}" for place, each in told)
        return Finding(
            self.says, word, f"{self.ours} against {against}{late}: {places}; it {counted(words, 'places')}."
        )


class Marks:
    """Rows of an experiment by series and place of the axis; only those of arms that did something."""

    def __init__(self, rows: Sequence[Row], axis: Axis) -> None:
        self.axis = axis
        self.full = [row for row in rows if row.label == FULL]
        self.prompt = max(row.prompt_tokens for row in rows)
        self.of: dict[tuple[str, float], list[Row]] = {}
        for row in rows:
            place = axis.place(row.settings, row.budget, self.prompt)
            if row.label != FULL and place is not None:
                self.of.setdefault((series(row.label), place), []).append(row)
        self.of = {key: of for key, of in self.of.items() if any(row.worked for row in of)}

    @property
    def names(self) -> list[str]:
        """Series, those that were asked for first."""
        return sorted(dict.fromkeys(name for name, _ in self.of), key=lambda name: name in controls())

    @property
    def places(self) -> list[float]:
        return sorted({place for _, place in self.of})

    def differences(self, ours: str, theirs: str, late: bool) -> Iterator[tuple[float, Spread]]:
        """At each place where both ran: the place, and how far ours lie above theirs."""
        for place in self.places:
            own = self.of.get((ours, place))
            others = self.full if theirs == FULL else self.of.get((theirs, place))
            if own and others and (found := difference(own, others, late)) is not None:
                yield place, found


def difference(ours: Sequence[Row], theirs: Sequence[Row], late: bool = False) -> Spread | None:
    """How far ours lie above theirs on the same items; None where fewer than two are the same."""
    other = {(row.seed, row.size, row.number): row for row in theirs}
    both = [(row, other[key]) for row in ours if (key := (row.seed, row.size, row.number)) in other]
    if len(both) < 2:
        return None
    answers = round(mean(len(row.right) * (LATE if late else 1) for row, _ in both))
    return spread([_share(row, late) for row, _ in both], [_share(row, late) for _, row in both], answers)


def _share(row: Row, late: bool) -> float:
    return mean(row.right[-max(1, round(LATE * len(row.right))) :]) if late else row.share


@dataclass(frozen=True)
class Accuracy(Experiment):
    """Right answers along an axis. ``arms``: what runs beside the full cache on a model and a task."""

    name: str
    title: str
    paper: str
    arms: Callable[[Lab], Sequence[Arm]]
    axis: Axis = BUDGETS
    claims: tuple[Claim, ...] = ()
    same: str | None = None

    def measure(self, lab: Lab, path: Path, known: Sequence[Path], tell: Tell) -> list[str]:
        others = [row for other in known if other.exists() for row in row_files.read(other)]
        run = Run(lab.model, lab.tokenizer, lab.name, lab.options, path, tell, others)
        run.run(self.arms(lab), [lab.task])
        return list(refusals(Report(lab.name, refused=run.refused)))

    def tell(self, rows: Rows) -> Found:
        own = scored(rows)
        told = report(own, {name: task_named(name) for name in dict.fromkeys(row.task for row in own)})
        marks = Marks(own, self.axis)
        return Found(
            list(tables(told)),
            [self._panel(told, marks)],
            findings=[claim.judged(marks) for claim in self.claims],
            doubts=list(verdicts(told, own)),
            grid=_grid(marks, self.axis),
        )

    def _panel(self, told: Report, marks: Marks) -> Panel:
        places = marks.places
        entries = [
            (series(entry.label), place, entry)
            for entry in told.entries
            if entry.label != FULL and entry.score is not None
            and (place := self.axis.place(entry.settings, entry.budget, marks.prompt)) is not None
        ]  # fmt: skip
        asked = [name for name in marks.names if name not in controls()]
        lines = []
        for number, name in enumerate(marks.names):
            points = [
                found
                for own, place, entry in entries
                if own == name and place in places and (found := point(places.index(place), _named(entry))) is not None
            ]
            control = name in controls()
            lines.append(dressed(name, number - len(asked) * control, points, control=control))
        return Panel(
            f"{told.model}, {told.tasks[0]} ({told.entries[0].items} items)",
            "Right answers with 95 % intervals; grey band: the full cache’s",
            tuple(self.axis.words(place) for place in places),
            self.axis.across,
            tuple(lines),
            point(0, told.entries[0]),
        )


def _grid(marks: Marks, axis: Axis) -> Table:
    """Scores with their intervals, a line for each series."""

    def cell(rows: Sequence[Row] | None) -> str:
        if not rows:
            return "–"
        found = interval([(sum(row.right), len(row.right)) for row in rows])
        return f"{percent(found.share)} ({percent(found.low)}–{percent(found.high)})"

    columns = [axis.across, *(axis.words(place) for place in marks.places)]
    lines = [["full cache", *[cell(marks.full)] * len(marks.places)]]
    lines += [[name, *(cell(marks.of.get((name, place))) for place in marks.places)] for name in marks.names]
    return Table("Percent of right answers (in brackets: 95 %)", columns, lines)


def _named(entry: Entry) -> Entry:
    """Without a budget in its name where the label says all."""
    return replace(entry, budget=None) if "," in entry.label else entry


def scored(rows: Rows) -> list[Row]:
    """Lines of a file as rows of compare, the last of each key."""
    told = [Row.from_dict(dict(row)) for row in rows]
    return list({(row.label, row.key): row for row in told}.values())
