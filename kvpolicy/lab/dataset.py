"""Texts from a file that the user names with ``--dataset``: prompts, and what was written after them. No torch.

Three forms are read, by what they hold: lines of JSON with ``prompt`` and ``output``; the same with ``pred``, which is
how LongGenBench keeps what a model wrote (arXiv:2412.13649, section 4); and a plain text, which is cut in two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.errors import UsageError

OUTPUTS = ("output", "pred")
"""Fields that hold what was written, the first that is there counts."""

HALF = 0.5


@dataclass(frozen=True)
class Text:
    """A prompt and what was written after it; ``output`` is empty where the file has none.

    number: from 0, among the texts of the file. place: where it stands, for messages.
    """

    number: int
    prompt: str
    output: str
    place: str


def read_dataset(path: Path, *, most: int | None = None, split: float = HALF) -> list[Text]:
    """The texts of a file, in its order.

    Args:
        most: texts to read at the most; what comes after them is not looked at.
        split: where a plain text is cut, as a share of its characters; the cut moves on to the next white space.

    Raises:
        UsageError: the file cannot be read, or a line makes no sense; the message names the line.
    """
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UsageError(f"{path}: a dataset is a .jsonl file (an object with a prompt on every line) or a .txt file")
    if not 0 < split < 1:
        raise UsageError(f"a text is split at a share of its length between 0 and 1, not at {split:g}")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: this is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give a .jsonl or .txt file") from None
    if path.suffix == ".txt":
        return [_plain(path, content, split)]
    texts = []
    for text in _lines(path, content):
        texts.append(text)
        if len(texts) == most:
            break
    if not texts:
        raise UsageError(f"{path} is empty; put an object with a prompt on every line")
    return texts


def need_outputs(texts: list[Text]) -> None:
    """For who compares what was written.

    Raises:
        UsageError: a text has no output.
    """
    for text in texts:
        if not text.output:
            fields = " or ".join(repr(name) for name in OUTPUTS)
            raise UsageError(f"{text.place}: there is nothing after the prompt; what was written goes in {fields}")


def _plain(path: Path, content: str, split: float) -> Text:
    """One text, cut in two behind the white space that follows the share ``split`` of it."""
    space = re.compile(r"\s+").search(content, round(len(content) * split))
    cut = space.start() if space else len(content)
    prompt, output = content[:cut], content[cut:].rstrip()
    if not prompt.strip() or not output.strip():
        raise UsageError(
            f"{path}: split at {split:.0%}, one of the two parts of this text is empty; give a longer text"
        )
    return Text(0, prompt, output, str(path))


def _lines(path: Path, content: str) -> Iterator[Text]:
    number = 0
    for line, said in enumerate(content.split("\n"), 1):
        if said.strip():
            yield _text(number, said, f"{path}, line {line}")
            number += 1


def _text(number: int, said: str, place: str) -> Text:
    try:
        data: Any = json.loads(said)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{place}: this is no JSON ({error.msg} at column {error.colno}); a line is one object"
        ) from None
    if not isinstance(data, dict) or "prompt" not in data:
        known = f", and this one has {', '.join(map(str, data))}" if isinstance(data, dict) and data else ""
        raise UsageError(f"{place}: a line is an object with a 'prompt'{known}")
    output = next((data[name] for name in OUTPUTS if data.get(name) is not None), "")
    for name, value in (("prompt", data["prompt"]), ("output", output)):
        if not isinstance(value, str):
            raise UsageError(f"{place}: the {name} is to be a string, and is {_kind(value)}")
    if not data["prompt"].strip():
        raise UsageError(f"{place}: the prompt is empty")
    return Text(number, data["prompt"], output, place)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
