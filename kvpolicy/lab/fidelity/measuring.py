"""Arms on the texts of a file: every arm is led through the same outputs, and each text becomes a row of ``compare``.

Texts go in batches, one in each process, and every arm does one batch before the next begins, budget after budget: a
run that is cut short has all arms, on fewer texts. What the full cache says of a batch is kept while it lasts, and so
are its prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from kvpolicy.lab.compare.arms import Arm, Bound, leaves_unread
from kvpolicy.lab.compare.keeping import Keeping
from kvpolicy.lab.compare.rows import Row, digest
from kvpolicy.lab.compare.running import versions
from kvpolicy.lab.dataset import Text, need_outputs
from kvpolicy.lab.fidelity.forcing import BLOCK, MASS, Forcing, Series, force, takes_layers
from kvpolicy.lab.fidelity.full_cache import Forced, Head, force_ids, full_states
from kvpolicy.lab.fidelity.prompts import Reading
from kvpolicy.models.processes import processes

TASK = "fidelity"


@dataclass(frozen=True)
class Options:
    """What is the same for all arms.

    new_tokens: of every output, the most that are forced; None: all. batch: texts at once. chat: whether prompts go
    through the model's chat template, None: if it has one; a text that is given is read as it stands.
    """

    new_tokens: int | None = None
    batch: int = 8
    chat: bool | None = False
    compile: bool | str = False
    generic: bool = False


@dataclass(frozen=True)
class Cell:
    """Some texts under one arm: what runs at once."""

    bound: Bound
    texts: Sequence[Forced]

    @property
    def name(self) -> str:
        return self.bound.arm.name


@dataclass
class Fidelity(Keeping):
    """A model and what it is led through; after every block of places ``tell`` hears of it."""

    options: Options
    _states: dict[int, Tensor] = field(default_factory=dict)
    _reading: Reading | None = None

    @property
    def way(self) -> str:
        """How texts go through the model: "layer by layer" or "step by step"; the numbers are the same."""
        layers = takes_layers(self.model.device, self.geometry)
        return "layer by layer" if layers else "step by step"

    def run(self, arms: Sequence[Arm], given: Sequence[Text]) -> None:
        """Fill ``rows``: those of the file that this run would make, and the others as they come.

        Raises:
            UsageError: a text has no output, or rows cannot be read or written.
            ModelError: a text would be longer than the model's, or its output layer is not known.
        """
        need_outputs(list(given))
        options = self.options
        texts = [force_ids(self.tokenizer, text, most=options.new_tokens, chat=options.chat) for text in given]
        how = Forcing.of(texts, batch=options.batch, compile=options.compile, generic=options.generic)
        Head(self.model).check(self.model, texts[0].ids)
        known, cells = self.find_known(), []
        bounds = list(self.arms_that_run(TASK, arms, how.prompt, how.new_tokens))
        budgets = list(dict.fromkeys(arm.budget for arm in arms))
        bounds.sort(key=lambda found: budgets.index(found.arm.budget))
        batches = [texts[start : start + options.batch] for start in range(0, len(texts), options.batch)]
        together = processes().count
        for first in range(0, len(batches), together):
            for found in bounds:
                for batch in batches[first : first + together]:
                    old = {text.number: known.get(self._row(found, text, how).key) for text in batch}
                    self.rows += [row for row in old.values() if row is not None]
                    if left := [text for text in batch if old[text.number] is None]:
                        cells.append(Cell(found, left))
        self.make(cells, partial(self._forced, how=how))

    def _row(self, found: Bound, text: Forced, how: Forcing) -> Row:
        """What is known of a row before it has run; its digest is of all that is read."""
        return Row(
            model=self.name,
            dtype=self.dtype,
            label=found.arm.label,
            digest=found.policy.digest,
            budget=found.arm.budget,
            settings=dict(found.settings),
            held=found.held,
            task=TASK,
            size=0,
            seed=0,
            number=text.number,
            prompt=digest([*text.prompt.tolist(), *text.output.tolist()]),
            limit=how.new_tokens,
            prompt_tokens=len(text.prompt),
            new_tokens=len(text.output),
            unread=leaves_unread(found.plan, len(text.prompt), len(text.output)),
            versions=versions(),
        )

    def _forced(self, cell: Cell, how: Forcing) -> list[Row]:
        places = sum(len(text.output) for text in cell.texts)

        def tell(tokens: int, seconds: float) -> None:
            self.note(f"{cell.name}: {tokens:,} of {places:,} tokens, {tokens / seconds:,.0f} a second")

        self.note(f"{cell.name}: the full cache reads")
        full = self._full(cell.texts)
        self.note(f"{cell.name}: prompts")
        reading = self._read(cell.texts)
        series = force(self.model, self.tokenizer, cell.bound.policy, cell.texts, full, how, reading=reading, tell=tell)
        return [
            replace(
                self._row(cell.bound, text, how),
                evicted=each.evicted,
                resident=each.resident,
                bytes=each.bytes,
                measures=measures(each),
            )
            for text, each in zip(cell.texts, series, strict=True)
        ]

    def _full(self, texts: Sequence[Forced]) -> list[Tensor]:
        """What the full cache says of these; what it said of others is forgotten where none of them is among these."""
        if not self._states.keys() & {text.number for text in texts}:
            self._states.clear()
        for text in texts:
            if text.number not in self._states:
                self._states[text.number] = full_states(self.model, text)
        return [self._states[text.number] for text in texts]

    def _read(self, texts: Sequence[Forced]) -> Reading:
        """Where the prompts of these are kept; those of others are forgotten."""
        if self._reading is None or [text.number for text in self._reading.texts] != [text.number for text in texts]:
            self._reading = Reading(self.model, texts)
        return self._reading


def measures(series: Series) -> dict[str, list[float]]:
    """As a row keeps them: the first place of each block, its places, and the mean of each measure over them; of the
    attention mass kept, where it was measured, the mean over ``mass_places`` of them."""
    kept: dict[str, list[float]] = {
        "positions": [number * BLOCK for number in range(len(series.count))],
        "places": [float(count) for count in series.count],
    }
    for name, sums in series.sums.items():
        kept[name] = [float(f"{total / count:.6g}") for total, count in zip(sums, series.count, strict=True)]
    if series.mass_count:
        kept["mass_places"] = [float(count) for count in series.mass_count]
        kept[MASS] = [
            float(f"{total / max(1, count):.6g}") for total, count in zip(series.mass, series.mass_count, strict=True)
        ]
    return kept
