"""An expression means the same in a kernel as on the host: exact ratios, floored once."""

import random
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kvpolicy.attention.kernels.quantities import count_function, share_function
from kvpolicy.language import Quantity

READS = {
    "t": torch.tensor([0, 3, 40]),
    "prompt_len": torch.tensor([5, 17, 640]),
    "size(prompt)": torch.tensor([16, 0, 48, 32, 640, 1000]),
    "seen(all)": torch.tensor([5, 20, 680]),
}
PLACES = {name: (number, name.startswith("size")) for number, name in enumerate(READS)}
ROWS, HEADS = 3, 2


def evaluate(function: Any, device: torch.device, count: int | None = None) -> list[int]:
    """What a kernel's function gives for every row and KV head."""

    @triton.jit
    def one_each(out, reads, count, FUNCTION: tl.constexpr, HEADS: tl.constexpr):
        cell = tl.program_id(0)
        if count is None:
            value = FUNCTION(reads, cell // HEADS, cell)
        else:
            value = FUNCTION(reads, cell // HEADS, cell, tl.load(count))
        tl.store(out + cell, value)

    out = torch.empty(ROWS * HEADS, dtype=torch.int64, device=device)
    reads = tuple(tensor.to(device) for tensor in READS.values())
    counts = None if count is None else torch.tensor([count], device=device)
    one_each[(ROWS * HEADS,)](out, reads, counts, FUNCTION=function, HEADS=HEADS)
    return out.tolist()


def known(cell: int) -> dict[str, int]:
    values = {name: int(tensor[cell if PLACES[name][1] else cell // HEADS]) for name, tensor in READS.items()}
    return values | {"context": values["t"] + values["prompt_len"]}


def written(pen: random.Random, depth: int) -> str:
    """A random expression that divides by nothing that may be 0."""
    if depth == 0 or pen.random() < 0.15:
        number = str(pen.choice([0, 1, 2, 3, 7, 16, 64, "50%", "1/3"]))
        return pen.choice([*READS, "context", number, number, number])
    a, b, c = (written(pen, depth - 1) for _ in range(3))
    return pen.choice(
        [
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} * {pen.choice([2, 3, '25%'])})",
            f"(-{a})",
            f"({a} / {pen.choice([2, 3, '(0 - 7)', 'max(1, t)'])})",
            f"({a} // {pen.choice([2, 5, '(0 - 3)', 'max(1, prompt_len)'])})",
            f"({a} {pen.choice(['<', '<=', '>', '>=', '=='])} {b})",
            f"if({a} {pen.choice(['<', '>='])} {b}, {c}, {a})",
            f"({a} and {b})",
            f"({a} or {b})",
            f"min({a}, {b}, {c})",
            f"max({a}, {b})",
            f"clamp({a}, 2, {b})",
            f"floor({a})",
            f"ceil({a})",
            f"round({a})",
        ]
    )


def floor(value: Fraction) -> int:
    return value.numerator // value.denominator


TEXTS = [
    "7",
    "20% * prompt_len",
    "8 + clamp((t - 8) * 12 // 88, 0, 12)",
    "max(2 * 16, 1024 - size(prompt))",
    "-t // 4 + 100",
    "(t - 30) / (t - 41) * 7",
    "seen(all) * 3 / 7 - 1/3",
    "round(t / 2 - 7)",
    *(written(random.Random(seed), 3) for seed in range(60)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_kernel_and_host_agree_on_every_row_and_head(text: str, device: torch.device) -> None:
    quantity = Quantity.parse(text)
    got = evaluate(count_function(quantity.tree, PLACES), device)
    assert got == [floor(quantity.evaluate(known(cell))) for cell in range(ROWS * HEADS)]


@pytest.mark.parametrize("text", ["50%", "1 / 3", "max(0, t - 7) / max(1, t)", "-1 / 3", "2"])
@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_a_share_is_rounded_up_exactly(text: str, count: int, device: torch.device) -> None:
    quantity = Quantity.parse(text)

    def share(values: Mapping[str, int]) -> int:
        return -floor(-quantity.evaluate(values) * count)

    got = evaluate(share_function(quantity.tree, PLACES), device, count)
    assert got == [share(known(cell)) for cell in range(ROWS * HEADS)]


def test_equal_expressions_are_one_function(device: torch.device) -> None:
    """So that kernels are compiled once for all layers and caches."""
    trees = [Quantity.parse("max(1, t // 2)").tree, Quantity.parse("max( 1,t//2 )").tree, Quantity.parse("t").tree]
    first, second, other = (count_function(tree, PLACES) for tree in trees)
    assert first is second and first is not other
