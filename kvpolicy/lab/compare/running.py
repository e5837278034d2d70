"""Runs arms on tasks: every arm writes about the same prompts, greedily, and each item becomes a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import kvpolicy
from kvpolicy.errors import UsageError
from kvpolicy.lab.compare.arms import Arm, Bound, leaves_unread
from kvpolicy.lab.compare.keeping import Keeping
from kvpolicy.lab.compare.loops import loop
from kvpolicy.lab.compare.rows import Row, digest
from kvpolicy.lab.running import Request, encode
from kvpolicy.lab.tasks.base import Item, Task
from kvpolicy.lab.watching import kept_by_row
from kvpolicy.patching import applied, cache_for
from kvpolicy.runtime import DecodeLoop, PolicyCache


@dataclass(frozen=True)
class Options:
    """What is the same for all arms.

    count, seed, size: of the items of each task; size None: the task's own.
    new_tokens: of every output; None: as many as the task says. batch: items that are run at once.
    chat: whether prompts go through the model's chat template; None: if it has one.
    """

    count: int = 16
    seed: int = 0
    size: int | None = None
    new_tokens: int | None = None
    batch: int = 16
    chat: bool | None = None
    compile: bool = False
    generic: bool = False


@dataclass(frozen=True)
class Question:
    """An item as the model reads it: token ids [N], which ``digest`` stands for."""

    item: Item
    ids: Tensor
    digest: str


@dataclass(frozen=True)
class Cell:
    """Some items under one arm: what runs at once."""

    bound: Bound
    task: Task
    questions: Sequence[Question]
    limit: int

    @property
    def name(self) -> str:
        return f"{self.task.name}: {self.bound.arm.name}"


@dataclass
class Run(Keeping):
    """A model and the tasks that it is given."""

    options: Options

    def run(self, arms: Sequence[Arm], tasks: Sequence[Task]) -> None:
        """Fill ``rows``: those of the file that this run would make, and the others as they come.

        Raises:
            UsageError: a task's prompts make no sense to this model, or rows cannot be read or written.
            ModelError: a text would be longer than the model's.
        """
        known, cells = self.find_known(), []
        for task in tasks:
            for cell in self._cells(task, arms):
                old = {question.item.number: known.get(self._row(cell, question).key) for question in cell.questions}
                name, settings = cell.bound.arm.label, dict(cell.bound.settings)
                self.rows += [replace(row, label=name, settings=settings) for row in old.values() if row is not None]
                left = [question for question in cell.questions if old[question.item.number] is None]
                cells += [replace(cell, questions=part) for part in _parts(left, self.options.batch)]
        self.make(cells, self.answers)

    def _cells(self, task: Task, arms: Sequence[Arm]) -> Iterator[Cell]:
        """A task under each arm that can run it."""
        questions = self.questions(task)
        most, limit = self._lengths(task, questions)
        fewest = min(len(question.ids) for question in questions)
        for found in self.arms_that_run(task.name, arms, (fewest, most), limit):
            yield Cell(found, task, questions, limit)

    def questions(self, task: Task) -> list[Question]:
        """A task's items as the model reads them. Raises UsageError where it has no tokens for its words."""
        return [self._question(item) for item in task.make(self.options.count, self.options.seed, self.options.size)]

    def lengths(self, task: Task) -> tuple[int, int]:
        """Tokens of a task's longest prompt, and new ones at the most. Raises UsageError, see ``questions``."""
        return self._lengths(task, self.questions(task))

    def _lengths(self, task: Task, questions: Sequence[Question]) -> tuple[int, int]:
        limit = self.options.new_tokens or max(task.new_tokens(question.item) for question in questions)
        return max(len(question.ids) for question in questions), limit

    def reads(self, task: Task) -> bool:
        """Whether the model has tokens for the words of a task."""
        return self._knows(self._ids(task.make(1, self.options.seed)[0]))

    def _ids(self, item: Item) -> Tensor:
        talks = bool(getattr(self.tokenizer, "chat_template", None)) and self.options.chat is not False
        return encode(self.tokenizer, Request(item.prompt + ("" if talks else item.lead), chat=self.options.chat))[0]

    def _knows(self, ids: Tensor) -> bool:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return unknown is None or unknown not in ids

    def _question(self, item: Item) -> Question:
        ids = self._ids(item)
        if not self._knows(ids):
            raise UsageError(
                f"{self.name} has no tokens for the words of the task {item.task}; choose another with --tasks, or "
                "another model"
            )
        return Question(item, ids, digest(ids.tolist()))

    def _row(self, cell: Cell, question: Question) -> Row:
        """What is known of a row before it has run."""
        found, item = cell.bound, question.item
        return Row(
            model=self.name,
            dtype=self.dtype,
            label=found.arm.label,
            digest=found.policy.digest,
            budget=found.arm.budget,
            settings=dict(found.settings),
            held=found.held,
            task=cell.task.name,
            size=cell.task.size if self.options.size is None else self.options.size,
            seed=self.options.seed,
            number=item.number,
            prompt=question.digest,
            limit=cell.limit,
            about=tuple(round(place, 4) for place in item.about),
            prompt_tokens=len(question.ids),
            versions=versions(),
        )

    def answers(self, cell: Cell) -> list[Row]:
        """Let the model write about some items at once, greedily. It is as before afterwards."""
        ids, mask = padded([question.ids for question in cell.questions], self._pad)
        lengths = [len(question.ids) for question in cell.questions]
        policy, options = cell.bound.policy, self.options
        with applied(
            self.model, policy, compile=options.compile, special_tokens=self.tokenizer, generic=options.generic
        ):
            cache = cache_for(
                self.model, prompt=(min(lengths), max(lengths)), max_new_tokens=cell.limit, batch=len(lengths)
            )
            ends = Ends(cache, self._ends)
            text = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                past_key_values=cache,
                max_new_tokens=cell.limit,
                do_sample=False,
                custom_generate=DecodeLoop(check_every=1, streamer=ends if self._ends else None),
                pad_token_id=self._pad,
            )
            ends.close()
        new = text[:, ids.shape[1] :].tolist()
        return [
            self._graded(cell, question, new[number], ends.counts[number], cache.bytes // len(lengths))
            for number, question in enumerate(cell.questions)
        ]

    def _graded(self, cell: Cell, question: Question, tokens: list[int], counts: tuple[int, int], size: int) -> Row:
        stop = next((place + 1 for place, token in enumerate(tokens) if token in self._ends), None)
        tokens = tokens[:stop]
        output = self.tokenizer.decode(tokens, skip_special_tokens=True)
        task, item, cut = cell.task, question.item, stop is None
        return replace(
            self._row(cell, question),
            right=task.grade(item, output, cut=cut),
            output=output,
            new_tokens=len(tokens),
            cut=cut,
            truncated=cut and not task.finished(item, output, cut=cut),
            looped=loop(task.words(output), allowed=task.period(item)) > 0,
            evicted=counts[0],
            resident=counts[1],
            unread=leaves_unread(cell.bound.plan, len(question.ids), len(tokens)),
            bytes=size,
        )

    @property
    def _ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

    @property
    def _pad(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return int(pad) if pad is not None else min(self._ends, default=0)


class Ends(BaseStreamer):
    """Counts what a row has kept when its text ends, before anything of a batch's padding comes after it.

    ``counts``: by row, tokens evicted over all layers and KV heads, and the most that any of them holds.
    """

    def __init__(self, cache: PolicyCache, ends: frozenset[int]) -> None:
        self.cache, self.ends = cache, ends
        self.counts: dict[int, tuple[int, int]] = {}
        self.began = False

    def put(self, value: Tensor) -> None:
        """Called with the prompt's ids, then with a new token [B] for each row; the newest is not in the cache yet."""
        if self.began:
            ended = [row for row, token in enumerate(value.tolist()) if token in self.ends and row not in self.counts]
            if ended:
                self._count(ended)
        self.began = True

    def end(self) -> None:
        """All rows have ended."""

    def close(self) -> None:
        """Count the rows that a limit ended."""
        rows = self.cache.plan.batch
        self._count([row for row in range(rows) if row not in self.counts])

    def _count(self, rows: list[int]) -> None:
        evicted, most = kept_by_row(self.cache)
        for row in rows:
            self.counts[row] = evicted[row], most[row]


def padded(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts [N] of any lengths as one batch with the padding on the left: ids and mask [B, most N]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def versions() -> dict[str, str]:
    """What a result may depend on."""
    return {
        "kvpolicy": kvpolicy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _parts(questions: Sequence[Question], most: int) -> Iterator[Sequence[Question]]:
    return (questions[start : start + most] for start in range(0, len(questions), most))
