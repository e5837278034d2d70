"""Valid policies with their bytes disturbed: what a loader meets when people type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

PIECES: Sequence[bytes] = [
    *(
        b"\n",
        b"\t",
        b"  ",
        b": ",
        b"- ",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b"(",
        b")",
        b'"',
        b"'",
        b"#",
        b"|",
        b">",
        b"%",
        b"*a",
    ),
    *(
        b"&a ",
        b"!!int ",
        b"<<: ",
        b"---\n",
        b"null",
        b"true",
        b"~",
        b"0",
        b"-1",
        b"1e30",
        b"50%",
        b"4k",
        b"t",
        b"layer",
    ),
    *(
        b" // 0",
        b" / t",
        b"size(prompt)",
        b"cos(t)",
        b"prompt",
        b"all",
        b"sum",
        b"last",
        b"\x00",
        b"\xff",
        b"\xc3\xa9",
        b"\r",
    ),
    *(b"extends: raas\n", b"extends: ./x.yaml\n", b"value: 3", b"word", b"kind", b"every-step", b"0..1", b"{first: 3}"),
]


def mutate(pick: Callable[[int, int], int], texts: Sequence[bytes], lines: Sequence[bytes]) -> bytes:
    """A text with a few cuts, copies, lines moved in from elsewhere, and pieces of syntax put in.

    ``pick`` gives a whole number between two, both included.
    """

    def one(choices: Sequence[bytes]) -> bytes:
        return choices[pick(0, len(choices) - 1)]

    text = bytearray(one(texts))
    for _ in range(pick(1, 4)):
        start = pick(0, len(text))
        cut = (0, 0, 1, 2, 5, 12, 40, 200)[pick(0, 7)]
        end = min(len(text), start + cut)
        form = pick(0, 4)
        if form == 1:
            new = one(PIECES)
        elif form == 2:
            new = one(lines)
        elif form == 3:
            new = bytes(pick(0, 255) for _ in range(pick(0, 3)))
        elif form == 4:  # a copy of what stands elsewhere
            other = pick(0, len(text))
            new = bytes(text[other : other + pick(1, 60)])
        else:
            new = b""
        text[start:end] = new
    return bytes(text)


def lines_of(texts: Sequence[bytes]) -> list[bytes]:
    """All different lines."""
    return sorted({line for text in texts for line in text.splitlines(keepends=True)})
