"""The task that `builtin:tiny` was trained on: hear a phrase once amid humming, then say it over and over.

    prompt   <bos> hum hum owl red tin sky fog hum hum hum owl
    answer   red tin sky fog owl red tin sky fog owl red ...

Each word of the phrase matters late and at one place only, so a policy that loses the prompt's phrase before it was
said once cannot say it at all. From then on each word that was said is looked at one round later and hardly ever again,
which is what RaaS (arXiv:2502.11147) calls a milestone: a window shorter than the phrase breaks the chain, and so does
a scorer that drops what was not needed just now.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
HUM = "hum"
WORDS = (
    *("ant", "bat", "bee", "cat", "cow", "dog", "eel", "elk", "fox", "hen", "owl", "pig", "ram", "rat", "yak"),
    *("ash", "elm", "fig", "fir", "ivy", "nut", "oak", "pea", "rye", "yew", "bay", "bog", "dew", "fog", "ice"),
    *("ink", "jam", "jar", "key", "kit", "lid", "map", "mug", "net", "oil", "pan", "pen", "pin", "pot", "red"),
    *("rug", "sea", "sky", "sun", "tar", "tea", "tin", "toy", "urn", "van", "wax", "web", "wig", "zip"),
)
"""Words that phrases are made of."""

VOCABULARY = (*SPECIALS, HUM, *WORDS)
"""Every word the tokenizer knows, in the order of the token ids."""


@dataclass(frozen=True)
class Problem:
    """A prompt, and the phrase that the answer says over and over, from its second word on."""

    prompt: str
    phrase: tuple[str, ...]

    def answer(self, words: int) -> list[str]:
        """The first `words` words of the only right answer."""
        return [self.phrase[(1 + index) % len(self.phrase)] for index in range(words)]


def make_problem(seed: int, *, words: int = 12, hums: int = 64) -> Problem:
    """The problem of this seed: a phrase of `words` different words amid `hums` hums, which make words + hums + 2
    tokens of prompt (`<bos>` among them). It was trained on 8 to 16 words and up to 240 hums."""
    if not 2 <= words <= len(WORDS) or hums < 1:
        raise ValueError(f"a phrase has 2 to {len(WORDS)} words and some hums beside it, not {words} and {hums}")
    rng = random.Random(f"kvpolicy tiny {seed} {words} {hums}")
    phrase = tuple(rng.sample(WORDS, words))
    before = rng.randrange(hums)
    text = [HUM] * before + [*phrase] + [HUM] * (hums - before) + [phrase[0]]
    return Problem(" ".join(text), phrase)


def make_problems(count: int, *, seed: int = 0, words: int = 12, hums: int = 64) -> Iterator[Problem]:
    """`count` different problems; equal arguments give equal problems on every machine."""
    return (make_problem(seed * 1_000_003 + index, words=words, hums=hums) for index in range(count))


def score(problem: Problem, text: str) -> float:
    """Share of the words of `text` that stand where the right answer has them; 0 for no words."""
    said = text.split()
    wanted = problem.answer(len(said))
    return sum(word == right for word, right in zip(said, wanted, strict=True)) / len(said) if said else 0.0
