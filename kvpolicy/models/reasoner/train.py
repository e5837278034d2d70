"""Make `builtin:reasoner`: python -m kvpolicy.models.reasoner.train [FOLDER]. About a quarter of an hour on two cores.

A three-layer Llama learns to work out chains of sums (``problem.py``). It starts with short problems and goes on
to longer ones whenever it can do these. Half of its first texts ask for one part of a line alone, to find the number of
a name, which a model is long in discovering: some repeat names and digits, which teaches it to look back at all, and
some repeat facts, which teaches it to look for a number. (With the first kind alone 2 % of all
tokens were still wrong after 1,500 steps; with the second alone it had found nothing after 800.)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.models.reasoner.problem import DIGITS, FACTS, LINE, NAMES, SPECIALS, VOCABULARY, make_problem
from kvpolicy.models.training import Lesson, fixed_tokenizer, train

LEARNING_RATE = 2e-3
TOKENS = 8192
"""Of a batch, about."""

ROWS = 40
"""Texts of a batch, at the most, while some only repeat: to begin with, many steps teach more than large ones."""

LONGEST = 36
"""Lines of a problem, at the most."""

LISTS = 6
"""Lines from which on no text only repeats."""

AGAIN = 3
"""How often a text that only repeats does so."""

CAN = 0.99
"""Share of tokens right, averaged over some ten batches, at which problems grow longer."""

COOLING = 500
"""Steps with problems of all lengths and a falling learning rate, at the end."""

ID = {token: index for index, token in enumerate(VOCABULARY)}


def make_config() -> LlamaConfig:
    """609,152 parameters; positions far beyond the training's, so that long runs stay finite."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=SPECIALS.index("<bos>"),
        eos_token_id=SPECIALS.index("<eos>"),
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a character."""
    tokenizer = fixed_tokenizer(VOCABULARY, Split(Regex("."), "isolated"), Fuse())
    tokenizer.eos_token = "<eos>"
    return tokenizer


class Text(NamedTuple):
    """What is read, what is said after it, and the tokens that are asked for where they are said."""

    read: Sequence[str]
    said: Sequence[str]
    asked: Sequence[str]


@dataclass
class School:
    """Gives lessons; ``lines`` is how long problems are by now."""

    rng: random.Random
    lines: int = 3
    average: float = 0.0
    cooling: int = 0

    def lesson(self, step: int, right: float) -> Lesson | None:
        """The next lesson, None after the last."""
        self.average += (right - self.average) / 10
        if self.lines == LONGEST:
            self.cooling += 1
        elif self.average > CAN:
            self.lines, self.average = min(LONGEST, self.lines + 1 + self.lines // 4), 0.0
        if self.cooling > COOLING:
            return None
        least = 4 if self.cooling else self.lines - 1
        lines = self.rng.randint(least, self.lines)
        ids, labels = _batch([*self._texts(lines)])
        rate = LEARNING_RATE * min(1.0, (step + 1) / 100) * (1.0 - 0.95 * self.cooling / COOLING)
        return Lesson(ids, labels, rate, f"{lines} lines")

    def _repeated(self) -> Text:
        """Different names and digits in some order, told AGAIN times more; the first that is repeated is given."""
        told = self.rng.sample(NAMES + DIGITS, self.rng.randint(6, 14))
        return Text([*told, told[0]], told[1:] + told * (AGAIN - 1), VOCABULARY)

    def _facts(self) -> Text:
        """Facts, told AGAIN times more in other orders, so that only their digits can be known."""
        told = [name + self.rng.choice(DIGITS) for name in self.rng.sample(NAMES, self.rng.randint(4, FACTS))]
        again = (fact for _ in range(AGAIN) for fact in self.rng.sample(told, len(told)))
        return Text("".join(told), "".join(again), DIGITS)

    def _texts(self, lines: int) -> Iterator[Text]:
        """About TOKENS in all."""
        most = min(FACTS + 2, 3 + 2 * lines)
        rows = TOKENS // ((LINE + 4) * lines + 2 * most)
        for _ in range(min(ROWS, rows) if self.lines < LISTS else rows):
            problem = make_problem(self.rng, steps=lines, facts=self.rng.randint(2, most))
            if lines < LISTS and self.rng.random() < 0.5:
                yield self._repeated() if self.rng.random() < 0.5 else self._facts()
            else:
                yield Text(problem.prompt, [*problem.output, "<eos>"], VOCABULARY)


def _batch(texts: list[Text]) -> tuple[Tensor, Tensor]:
    """Texts and labels [B, T], labels where something is asked."""
    width = max(len(text.read) + len(text.said) for text in texts) + 1
    ids, labels = torch.full((len(texts), width), ID["<pad>"]), torch.full((len(texts), width), -100)
    for row, text in enumerate(texts):
        tokens = ["<bos>", *text.read, *text.said]
        ids[row, : len(tokens)] = torch.tensor([ID[token] for token in tokens])
        for place in range(1 + len(text.read), len(tokens)):
            if tokens[place] in text.asked:
                labels[row, place] = ids[row, place]
    return ids, labels


def main() -> None:
    """Train, and write model and tokenizer to a folder (default: this one)."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.manual_seed(0)
    school = School(random.Random("kvpolicy reasoner"))
    model = LlamaForCausalLM(make_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    train(model, optimizer, school.lesson)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
