"""One result is one row: a model under one policy at one budget, on one item of a task. Rows are lines of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError

VERSION = 1
"""Of the lines; it grows when a field changes its meaning or goes away."""


@dataclass(frozen=True)
class Row:
    """What came of one item. Tokens are those of the model's tokenizer.

    Attributes:
        model, dtype: as it was named, and what it computes in.
        label: what the policy is called in the report. digest: of the policy with its params bound; the same digest is
            the same policy.
        budget: tokens asked for; None: the full cache, or a policy with its own params.
        settings: the params that were set, as ``--set`` says them.
        held: tokens that the plan lets stay after an update, the mean of the layers, per KV head.
        task, size, seed, number: which item it is. prompt: a digest of the token ids that the model read.
        limit: new tokens at the most.
        right: for each answer asked for, whether it was given. Empty where nothing is scored.
        about: where in the prompt stands what each answer needs, 0 to 1; empty where nothing is scored.
        output: what was written; for text that was only read, empty.
        prompt_tokens, new_tokens: read, and written (or read under teacher forcing).
        cut: the limit ended it. truncated: and before it had said something of all that it was asked for.
        looped: it ends in one stretch of words said over and over, which nobody had asked for.
        evicted: tokens that left, over all layers and KV heads. unread: whether some step read only a part of what it
            held, as policies do that select.
        resident: the most tokens of any layer and KV head that stayed at the end. bytes: of the cache.
        measures: what is measured rather than scored, by name: a number, or one for each of ``positions``.
        versions: of kvpolicy, torch and transformers.
    """

    model: str
    dtype: str
    label: str
    digest: str
    budget: int | None
    settings: dict[str, str]
    held: int
    task: str
    size: int
    seed: int
    number: int
    prompt: str
    limit: int
    right: tuple[bool, ...] = ()
    about: tuple[float, ...] = ()
    output: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut: bool = False
    truncated: bool = False
    looped: bool = False
    evicted: int = 0
    unread: bool = False
    resident: int = 0
    bytes: int = 0
    measures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same result in another run."""
        return (
            self.model, self.dtype, self.digest, self.budget, self.task, self.size, self.seed, self.number, self.prompt,
            self.limit,
        )  # fmt: skip

    @property
    def share(self) -> float:
        """Of its answers, how many are right, 0 to 1. Raises ZeroDivisionError where nothing is scored."""
        return sum(self.right) / len(self.right)

    @property
    def worked(self) -> bool:
        """Whether the policy did anything: dropped tokens, or left some unread."""
        return self.evicted > 0 or self.unread

    def to_dict(self) -> dict[str, Any]:
        return {"kvpolicy_row": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The row that ``to_dict`` told. Raises KeyError, TypeError or ValueError where it is none."""
        if data["kvpolicy_row"] != VERSION:
            raise ValueError(f"a row of version {data['kvpolicy_row']}, and this kvpolicy writes version {VERSION}")
        known = {entry.name for entry in fields(cls)}
        told = {name: value for name, value in data.items() if name in known}
        return cls(**told | {name: tuple(told[name]) for name in ("right", "about")})


def digest(ids: Sequence[int]) -> str:
    """Of token ids: equal for equal texts only."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, a line each; a last line without an end, as an interrupted run leaves it, is taken away.

    Raises:
        UsageError: it cannot be written.
    """
    text = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; give a path in a folder that exists") from None


def read(path: Path) -> list[Row]:
    """The rows of a file, the last of each key; none where there is no such file.

    A last line without an end, as an interrupted run leaves it, is left out.

    Raises:
        UsageError: it cannot be read, or a line is no row.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    return list({row.key: row for row in _rows(path, text)}.values())


def _rows(path: Path, text: str) -> Iterator[Row]:
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield Row.from_dict(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            reason = (
                str(error) if isinstance(error, ValueError) and "version" in str(error) else "it is no row of compare"
            )
            raise UsageError(f"{path}, line {number}: {reason}; give another file, or remove this one") from None
