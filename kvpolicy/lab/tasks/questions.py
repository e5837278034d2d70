"""Many questions in one prompt, answered one after the other in one long output, in the form of LongGenBench.

Its own scoring takes the answers by their order of appearance, so that a question left out makes all later ones wrong;
here an answer belongs to the number that it is written under (arXiv:2410.04199; arXiv:2412.13649 decodes with it).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from kvpolicy.lab.tasks.base import Item, Task, places, plain

PEOPLE = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max", "Ida", "Sam", "Ruth", "Paul", "Nora", "Hugo")
GOODS = ("apples", "books", "stamps", "coins", "pencils", "shells", "cards", "eggs", "marbles", "plums", "buttons")
EXAMPLES = 3
WORDS = 26
"""Of a question, about."""

NUMBER = r"-?\d(?:[\d,]*\d)?(?:\.\d+)?"


class Sum(NamedTuple):
    """A question, how its answer comes about, and the answer."""

    question: str
    steps: str
    answer: int


class Questions(Task):
    name = "questions"
    summary = "many sums in words in one prompt, answered in one long output, each under its number"
    size, least = 400, 180

    def item(self, number: int, rng: random.Random, size: int) -> Item:
        examples = [_sum(rng) for _ in range(EXAMPLES)]
        sums = [_sum(rng) for _ in range(max(1, (size - 150) // WORDS))]
        names = tuple(str(EXAMPLES + place) for place in range(1, 1 + len(sums)))
        asked = [f"Question_{name}:\n{each.question}\n" for name, each in zip(names, sums, strict=True)]
        shown = [f"Question_{place}:\n{each.question}\n" for place, each in enumerate(examples, 1)]
        solved = [
            f"Answer_{place}:\n{each.steps} The answer is {each.answer}.\n" for place, each in enumerate(examples, 1)
        ]
        prompt = (
            "Answer each question step by step, in the form of the examples. Begin each answer with 'Answer_' and the "
            "number of its question, and end it with 'The answer is'. Do not repeat the questions. Answer all of them, "
            "however many there are.\n\nExamples:\n"
            + "\n".join([*shown, *solved])
            + "\nNow the questions that you answer:\n"
            + "\n".join(asked)
            + f"\nAnswer all {len(sums)} questions, from Answer_{names[0]} to Answer_{names[-1]}.\n"
        )
        answers = tuple(str(each.answer) for each in sums)
        return Item(self.name, number, prompt, answers, names, places(prompt, asked))

    def said(self, item: Item, output: str) -> Mapping[str, str]:
        """The first part that is written under a number counts: in it what follows "answer is", or its only number."""
        heads = list(re.finditer(r"(?<!\w)Answer[ _#]*(\d+)(?!\w|\.\d)", output, re.IGNORECASE))
        ends = [*(head.start() for head in heads[1:]), len(output)]
        found: dict[str, str] = {}
        for head, end in zip(heads, ends, strict=False):  # without any head there is nothing to end
            value = given(output[head.end() : end])
            if value is not None and head[1] in item.names:
                found.setdefault(head[1], value)
        return found

    def new_tokens(self, item: Item) -> int:
        return 64 + 56 * len(item.answers)


def given(text: str) -> str | None:
    """The number that a part of an output gives as its answer; None where it gives none."""
    said = re.search(rf"answer\s+is\s*:?\s*\W{{0,4}}?\$?({NUMBER})", text, re.IGNORECASE)
    numbers = re.findall(NUMBER, text)
    if said is None and len(numbers) != 1:
        return None
    value = plain(said[1] if said else numbers[0])
    return re.sub(r"\.0+\Z", "", value)


def _sum(rng: random.Random) -> Sum:
    who, what = rng.choice(PEOPLE), rng.choice(GOODS)
    has, more, gives = rng.randrange(20, 50), rng.randrange(11, 40), rng.randrange(2, 10)
    first, second = has + more, has + more - gives
    kind = rng.randrange(3)
    if kind == 0:
        return Sum(
            f"{who} has {has} {what}, finds {more} more and gives {gives} of them away. How many {what} does {who} "
            "have in the end?",
            f"{has} + {more} = {first}. {first} - {gives} = {second}.",
            second,
        )
    if kind == 1:
        boxes, each = rng.randrange(3, 8), rng.randrange(3, 9)
        return Sum(
            f"{who} buys {boxes} boxes with {each} {what} in each and already has {has} at home. How many {what} are "
            "these in all?",
            f"{boxes} * {each} = {boxes * each}. {boxes * each} + {has} = {boxes * each + has}.",
            boxes * each + has,
        )
    return Sum(
        f"On Monday {who} sold {gives} {what}, on Tuesday {has}, and on Wednesday {more}. How many {what} did {who} "
        "sell on these days?",
        f"{gives} + {has} = {gives + has}. {gives + has} + {more} = {gives + first}.",
        gives + first,
    )


TASK = Questions()
