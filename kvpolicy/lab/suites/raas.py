"""What RaaS's paper shows (arXiv:2502.11147), measured again."""

from __future__ import annotations

from collections.abc import Sequence

from kvpolicy.lab.compare.arms import Arm
from kvpolicy.lab.suites.accuracy import Accuracy, Axis, Claim
from kvpolicy.lab.suites.arms import VARIANT, arm, full, quest
from kvpolicy.lab.suites.base import Lab, Suite
from kvpolicy.lab.suites.claims import Kind
from kvpolicy.lab.suites.cost import BUDGET, Cost
from kvpolicy.lab.suites.kept import Kept
from kvpolicy.lab.suites.places import ByPlace

TOUCHES = ("10%", "25%", "50%", "75%", "90%")
ALPHAS = ("0.1", "0.01", "0.001", "0.0001", "0.00001")
PAGES = (1, 2, 4, 8, 16, 32)


def compared(lab: Lab) -> Sequence[Arm]:
    """All that the paper compares; its Sink is streaming-llm."""
    beside = ("raas", "h2o", "streaming-llm")
    return [
        full(),
        *(arm(lab, name, budget) for name in beside for budget in lab.budgets),
        *(arm(lab, quest(lab), budget, "quest") for budget in lab.budgets),
    ]


def around_the_prompt(lab: Lab) -> Sequence[Arm]:
    """Budgets from a third of the prompt to twice its size, one of them a page short of it, with the two ways out."""
    page = lab.page
    sizes = {max(2, round(lab.prompt * share / page)) * page for share in (1 / 3, 2 / 3)}
    sizes |= {(-(-lab.prompt // page) + more) * page for more in (-1, 2, 4, 8)}
    budgets = sorted(size for size in sizes if size < lab.prompt + lab.new - 1)
    names = ("raas", "raas-as-coded", "raas-compressed-prompt", "quest-raas")
    return [full(), *(arm(lab, name, budget) for name in names for budget in budgets)]


def below(budget: float, prompt: int) -> bool:
    return budget < prompt


def half(touch: float, prompt: int) -> bool:
    return touch == 0.5


def room(lab: Lab) -> int:
    """A budget that leaves RaaS the prompt and a quarter of the output, two pages at the least, in whole pages."""
    pages = -(-lab.prompt // lab.page) + 2
    return max(pages, -(-(lab.prompt + lab.new // 4) // lab.page)) * lab.page


def touches(lab: Lab) -> Sequence[Arm]:
    return [
        full(),
        *(arm(lab, "raas", room(lab), f"raas{VARIANT}touch {touch}", touch=_share(touch)) for touch in TOUCHES),
    ]


def alphas(lab: Lab) -> Sequence[Arm]:
    arms = [arm(lab, "raas-alpha", room(lab), f"raas-alpha{VARIANT}alpha {alpha}", alpha=alpha) for alpha in ALPHAS]
    return [full(), *arms]


def pages(lab: Lab) -> Sequence[Arm]:
    fits = [page for page in PAGES if 2 * page <= lab.new // 4]
    return [full(), *(arm(lab, "raas", room(lab), f"raas{VARIANT}page_size {page}", page_size=page) for page in fits)]


def _share(text: str) -> str:
    return str(int(text.removesuffix("%")) / 100)


def timed(lab: Lab) -> Sequence[Arm]:
    """Quest is left out: it holds everything, and bench times what is held to a budget."""
    return [arm(lab, name, BUDGET, page_size=16) if name == "raas" else arm(lab, name, BUDGET) for name in
            ("raas", "h2o", "streaming-llm")]  # fmt: skip


def followed(lab: Lab) -> Sequence[Arm]:
    return [arm(lab, name, room(lab)) for name in ("raas", "h2o", "streaming-llm")]


SUITE = Suite(
    "raas",
    "RaaS: milestones are kept while they are used, the prompt always",
    "arXiv:2502.11147",
    (
        Accuracy(
            "raas-accuracy", "Accuracy against budget", "its curves of accuracy over budgets 64 to 1,024", compared,
            claims=(
                Claim("RaaS is as good as Quest", Kind.NEAR, "raas", "quest"),
                Claim("RaaS is better than H2O", Kind.ABOVE, "raas", "h2o"),
                Claim("RaaS is better than a sink and a window", Kind.ABOVE, "raas", "streaming-llm"),
                Claim("RaaS comes up to the full cache at some budget", Kind.NEAR, "raas", every=False),
                Claim("Quest comes up to the full cache at some budget", Kind.NEAR, "quest", every=False),
            ),
        ),
        ByPlace(
            "raas-late", "Right answers by place in the output", "no figure of its own; what is lost shows late",
            "raas-accuracy",
            claims=(
                Claim("late answers: RaaS is better than H2O", Kind.ABOVE, "raas", "h2o", late=True),
                Claim("late answers: RaaS is better than a sink and a window", Kind.ABOVE, "raas", "streaming-llm",
                      late=True),
            ),
        ),
        Accuracy(
            "raas-prompt", "Budgets around the size of the prompt", "what it says of small budgets and of long prompts",
            around_the_prompt,
            claims=(
                Claim("below the prompt's size, RaaS as coded falls off", Kind.BELOW, "raas-as-coded", at=below),
                Claim("below the prompt's size, a compressed prompt mends it", Kind.ABOVE, "raas-compressed-prompt",
                      "raas-as-coded", at=below),
                Claim("below the prompt's size, Quest for the prompt mends it", Kind.ABOVE, "quest-raas",
                      "raas-as-coded", at=below),
            ),
        ),
        Accuracy(
            "raas-touch", "Share of pages that are stamped as used (r)", "its ablation of r, best at 50 %", touches,
            Axis("touch", "r, the share of pages stamped in a step"),
            claims=(Claim("at r = 50 % RaaS comes up to the full cache", Kind.NEAR, "raas", at=half),),
        ),
        Accuracy(
            "raas-alpha", "Attention that stamps a page as used (alpha)",
            "its first version's ablation of alpha, best at 1e-4", alphas, Axis("alpha", "alpha"),
        ),
        Accuracy(
            "raas-page-size", "Tokens of a page", "not in the paper, which takes 16", pages,
            Axis("page_size", "page size (tokens)"),
        ),
        Kept("raas-kept", "Position of kept tokens by step", "the pattern that it is built on", followed,
             unified=("h2o",)),
        Cost("raas-cost", "Time and memory by length of the output", "its curves of completion time and of memory",
             timed, flat=("raas",)),
    ),
)  # fmt: skip
