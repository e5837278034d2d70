"""SCOPE's three strategies (section 3 of arXiv:2412.13649), each after four ways to compress the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvpolicy.language import load_policy
from tests.policies.recipes.kit import check, text
from tests.policies.recipes.plain import Head, Layer, top
from tests.policies.recipes.prompts import heavy, pyramid, snapkv

ALPHA, ALPHA2, BETA1, BETA2, HORIZON, KERNEL, STEEPNESS = 20, 6, 12, 8, 110, 3, 4
INTERVAL = (HORIZON - BETA2) // BETA1

PROMPTS: dict[str, Callable[[Layer, int], set[int]]] = {
    "": lambda layer, head: heavy(layer, head, ALPHA, ALPHA2),
    "-full": lambda layer, head: set(range(layer.prompt)),
    "-snapkv": lambda layer, head: snapkv(layer, head, ALPHA, ALPHA2, KERNEL),
    "-pyramidkv": lambda layer, head: snapkv(layer, head, pyramid(layer, ALPHA, ALPHA2, STEEPNESS), ALPHA2, KERNEL),
}


def history(strategy: str, t: int) -> int:
    """How many of the generated tokens before the newest beta2 may stay: beta1, or what it has grown to by t."""
    if strategy == "slide":
        return BETA1
    return min(BETA1, max(0, (t - BETA2) * BETA1 // (HORIZON - BETA2)))


def scope(strategy: str, compressed: Callable[[Layer, int], set[int]], layer: Layer) -> Iterator[list[Head]]:
    """The prompt is cut once; of the generated tokens stay the newest, and what the current query looks at most."""
    prompts = [compressed(layer, head) for head in layer.heads]
    generated: list[list[int]] = [[] for _ in layer.heads]
    yield [Head(prompt) for prompt in prompts]
    for t, newest in enumerate(layer.generated, start=1):
        for head, prompt in enumerate(prompts):
            residents = [*sorted(prompt), *generated[head], newest]
            attention = dict(zip(residents, layer.attention(head, newest, residents).mean(axis=0), strict=True))
            generated[head].append(newest)
            if strategy != "discontinuous" or t % INTERVAL == 0:
                older = {position: attention[position] for position in generated[head][:-BETA2]}
                generated[head] = sorted(top(history(strategy, t), older)) + generated[head][-BETA2:]
        yield [Head(prompt | set(pool)) for prompt, pool in zip(prompts, generated, strict=True)]


@pytest.mark.parametrize("strategy", ["slide", "adaptive", "discontinuous"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_keeps_what_the_paper_keeps(strategy: str, prompt: str) -> None:
    policy = load_policy(f"scope-{strategy}{prompt}")
    params = {"alpha": ALPHA, "alpha2": ALPHA2, "beta1": BETA1, "beta2": BETA2, "horizon": HORIZON}
    params |= {"kernel": KERNEL, "steepness": STEEPNESS}
    policy = policy.bind(**{name: value for name, value in params.items() if name in policy.params})
    said = text(layers=2 if prompt == "-pyramidkv" else 1)
    check(policy, lambda layer: scope(strategy, PROMPTS[prompt], layer), said)


@pytest.mark.parametrize("strategy", ["slide", "adaptive", "discontinuous"])
def test_what_is_generated_is_kept_alike_however_much_of_the_prompt_a_layer_kept(strategy: str) -> None:
    """The generated pool's budget is bound to no prompt count, nominal or real, in the policy itself."""
    for prompt in PROMPTS:
        budget = load_policy(f"scope-{strategy}{prompt}").pools["generated"].budget
        assert budget is not None and not {name for name in budget.names if "prompt" in name or name == "context"}
