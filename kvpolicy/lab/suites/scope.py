"""What SCOPE's paper shows (arXiv:2412.13649), measured again."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.lab.compare.arms import Arm
from kvpolicy.lab.suites.accuracy import Accuracy, Axis, Claim
from kvpolicy.lab.suites.arms import VARIANT, arm, full
from kvpolicy.lab.suites.base import Lab, Suite
from kvpolicy.lab.suites.claims import Kind
from kvpolicy.lab.suites.cost import BUDGET, Cost
from kvpolicy.lab.suites.kept import Kept
from kvpolicy.lab.suites.places import ByPlace

STRATEGIES = ("scope-slide", "scope-adaptive", "scope-discontinuous")
UNIFIED = ("h2o", "streaming-llm", "pyramidinfer")

PROMPT_SHARE = 0.6
"""Of the prompt that is kept, as in its main tables."""

DECODE_SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of the output that may be held: the first two are the paper's."""

PROMPT_SHARES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
SPLITS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)


def _alpha(lab: Lab, share: float = PROMPT_SHARE) -> int:
    return max(2, round(lab.prompt * share))


def _scope(lab: Lab, name: str, alpha: int, beta1: int, beta2: int, budget: bool = True, label: str = "") -> Arm:
    """A strategy with its sizes; the total is its budget, unless it is one of a series along another axis."""
    sizes = {"alpha": alpha, "alpha2": min(8, alpha // 2), "beta1": beta1, "beta2": beta2}
    return arm(lab, name, alpha + beta1 + beta2 if budget else None, label, **sizes)


def _decode(lab: Lab, share: float) -> int:
    """An even number of tokens, half of them for each of beta1 and beta2."""
    return max(4, 2 * round(lab.new * share / 2))


def compared(lab: Lab) -> Sequence[Arm]:
    """The three strategies, and unified caches of the same total."""
    arms = [full()]
    for whole in dict.fromkeys(_decode(lab, share) for share in DECODE_SHARES):
        half = whole // 2
        arms += [_scope(lab, name, _alpha(lab), half, half) for name in STRATEGIES]
        arms += [arm(lab, name, _alpha(lab) + 2 * half) for name in UNIFIED]
    return arms


def whole_prompt(lab: Lab) -> Sequence[Arm]:
    """The three strategies behind a whole prompt, and unified caches of the same total."""
    arms = [full()]
    for whole in dict.fromkeys(_decode(lab, share) for share in DECODE_SHARES):
        half = whole // 2
        arms += [_scope(lab, name, _alpha(lab, 1.0), half, half) for name in STRATEGIES]
        arms += [arm(lab, name, _alpha(lab, 1.0) + whole) for name in UNIFIED[:2]]
    return arms


def beta1(lab: Lab) -> Sequence[Arm]:
    """beta1 varies beside a fixed beta2."""
    half = _decode(lab, 1 / 4) // 2
    sizes = dict.fromkeys(max(1, round(2 * half * split)) for split in SPLITS)
    return [full(), *(
        _scope(lab, name, _alpha(lab), size, half, False, f"{name}{VARIANT}beta1 {size}")
        for name in STRATEGIES for size in sizes
    )]  # fmt: skip


def beta2(lab: Lab) -> Sequence[Arm]:
    """beta2 varies under a fixed beta1 + beta2."""
    whole = _decode(lab, 1 / 4)
    sizes = dict.fromkeys(min(whole - 1, max(1, round(whole * split))) for split in SPLITS)
    return [full(), *(
        _scope(lab, name, _alpha(lab), whole - size, size, False, f"{name}{VARIANT}beta2 {size}")
        for name in STRATEGIES for size in sizes
    )]  # fmt: skip


def prompt_ratio(lab: Lab) -> Sequence[Arm]:
    """The share of the prompt that is kept, with a quarter of the output."""
    half = _decode(lab, 1 / 4) // 2
    return [full(), *(
        _scope(lab, name, _alpha(lab, share), half, half, False, f"{name}{VARIANT}prompt {100 * share:.0f} %")
        for name in STRATEGIES for share in PROMPT_SHARES
    )]  # fmt: skip


def timed(lab: Lab) -> Sequence[Arm]:
    """Unified caches and the three strategies; the prompt, which bench makes short, gets a third of the budget."""
    third = BUDGET // 3
    rest = (BUDGET - third) // 2
    scope = [_scope(lab, name, BUDGET - 2 * rest, rest, rest, True) for name in STRATEGIES]
    return [*scope, *(arm(lab, name, BUDGET) for name in ("h2o", "streaming-llm"))]


def followed(lab: Lab) -> Sequence[Arm]:
    half = _decode(lab, 1 / 4) // 2
    total = _alpha(lab) + 2 * half
    return [
        *(_scope(lab, name, _alpha(lab), half, half) for name in STRATEGIES), arm(lab, "h2o", total),
        arm(lab, "streaming-llm", total),
    ]  # fmt: skip


def _better(late: bool = False, prompt: str = "") -> tuple[Claim, ...]:
    place = prompt + ("late answers: " if late else "")
    return tuple(
        Claim(f"{place}{name} is better than {other} of equal size", Kind.ABOVE, name, other, late=late)
        for name in STRATEGIES for other in UNIFIED[:2]
    )  # fmt: skip


SUITE = Suite(
    "scope",
    "SCOPE: prompt and output are compressed apart",
    "arXiv:2412.13649",
    (
        Accuracy(
            "scope-accuracy", "Accuracy against budget: 60 % of the prompt, and a share of the output",
            "its main tables, with decode budgets of 12.5 % and 25 % of the output", compared, claims=_better(),
        ),
        ByPlace(
            "scope-late", "Right answers by place in the output", "no figure of its own; long outputs are its point",
            "scope-accuracy", claims=_better(late=True),
        ),
        Accuracy(
            "scope-whole", "Accuracy against budget behind a whole prompt",
            "its rows with a prompt that is not compressed", whole_prompt,
            claims=_better(prompt="behind a whole prompt, "),
        ),
        Accuracy(
            "scope-beta1", "Generated tokens kept by score (beta1)", "its sensitivity to beta1, which it finds flat",
            beta1, Axis("beta1", "beta1 (tokens)"),
        ),
        Accuracy(
            "scope-beta2", "Newest tokens kept in any case (beta2)",
            "its sensitivity to beta2: adaptive and discontinuous fall off where it is small, slide does not", beta2,
            Axis("beta2", "beta2 (tokens), beta1 + beta2 fixed"),
        ),
        Accuracy(
            "scope-prompt", "Share of the prompt that is kept", "its curves of accuracy over prompt ratios",
            prompt_ratio, Axis("alpha", "share of the prompt that is kept", of_prompt=True),
        ),
        Kept(
            "scope-kept", "Position of kept tokens by step", "its heavy hitters by position: they move off the prompt",
            followed, unified=("h2o", "streaming-llm"),
        ),
        Cost(
            "scope-cost", "Time and memory by length of the output", "its Table 3 (memory and tokens a second)", timed,
            flat=STRATEGIES[:1],
        ),
    ),
)  # fmt: skip
