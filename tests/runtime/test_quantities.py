"""An expression means the same on tensors as on the host."""

from fractions import Fraction

import pytest
import torch

from kvpolicy.language import Quantity
from kvpolicy.runtime.quantities import floored, share_of

EXPRESSIONS = [
    "7",
    "prompt_len // 5",
    "20% * prompt_len",
    "beta + clamp((t - 8) * 12 // 88, 0, 12)".replace("beta", "8"),
    "max(2 * 16, 1024 - size(prompt))",
    "if(t < 20 and prompt_len > 3, t * 2, context / 3)",
    "if(t >= 20 or prompt_len == 5, ceil(t / 7), floor(t / 7))",
    "round(t / 2) + min(t, prompt_len, 9)",
    "-t // 4 + 100",
    "(t - 30) / (t - 41) * 7",
    "seen(generated) * 3 / 7 - 1/3",
    "max(1, t / 3, prompt_len / 7) // max(1, t - 5)",
    "t <= 3",
    "(t > 3) * 5 + (t < 3) * 7",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_tensor_and_host_agree_on_every_row(text: str) -> None:
    quantity = Quantity.parse(text)
    prompt, t = torch.tensor([5, 17, 0, 640]), torch.tensor([0, 3, 40, 129])
    sizes = torch.tensor([[16, 32], [48, 0], [0, 0], [640, 1000]])
    values = {
        "t": t[:, None],
        "prompt_len": prompt[:, None],
        "context": (t + prompt)[:, None],
        "size(prompt)": sizes,
        "seen(generated)": t[:, None],
    }
    got = floored(quantity.tree, values)
    got = torch.as_tensor(got).expand(4, 2)
    for row in range(4):
        for head in range(2):
            known = {
                "t": int(t[row]),
                "prompt_len": int(prompt[row]),
                "context": int(t[row] + prompt[row]),
                "size(prompt)": int(sizes[row, head]),
                "seen(generated)": int(t[row]),
            }
            exact = quantity.evaluate(known)
            assert int(got[row, head]) == exact.numerator // exact.denominator, (text, known)


def test_a_share_is_rounded_up_exactly() -> None:
    third = Quantity.parse("1 / 3").tree
    counts = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    assert share_of(third, counts, {}).tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert share_of(Quantity.parse("50%").tree, counts, {}).tolist() == [0, 1, 1, 2, 2, 3, 4]


def test_constants_cost_no_tensor() -> None:
    assert floored(Quantity.parse("3 * 7 // 2").tree, {}) == 10
    assert floored(Quantity.number(Fraction(7, 2)).tree, {}) == 3
