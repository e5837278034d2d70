"""Prompt passes on the triton backend keep what the oracle keeps: turns, chunks, padding, every way to reduce."""

import pytest
import torch

from kvpolicy.attention.kernels import prompt
from kvpolicy.language import loads_policy
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.testing.beside import Beside

GEOMETRY = ModelGeometry("random", layers=1, query_heads=6, kv_heads=2, head_dim=16)

TOKENS = "pools: {{all: {{admit: all, budget: 11, window: 2, scorer: {{{scorer}, queries: all, memory: sum}}}}}}"
TWO = """
pools:
  prompt:
    {{admit: prompt, budget: 9, scorer: {{{scorer}, queries: all}}, update: prompt-end}}
  generated: {{admit: generated, budget: 6, scorer: {{{scorer}, queries: all, memory: sum}}}}
"""
PAGES = """
pools:
  all: {{admit: all, page: 3, budget: 15, scorer: {{{scorer}, queries: all, memory: {{decay: 0.5}}}}}}
"""
POLICIES = {
    "summed over the cache": TOKENS.format(scorer="signal: attention"),
    "the best head": TOKENS.format(scorer="signal: attention, heads: max"),
    "the best head's logits": TOKENS.format(scorer="signal: attention, heads: {logits: max}, over: candidates"),
    "among candidates, two pools": TWO.format(scorer="signal: attention, over: candidates, heads: sum"),
    "within a pool of two": TWO.format(scorer="signal: attention, over: pool"),
    "logits": TOKENS.format(scorer="signal: attention-logit, heads: sum"),
    "pages": PAGES.format(scorer="signal: attention, heads: max"),
    "bounds of pages": PAGES.format(scorer="signal: page-bound, heads: max"),
}


@pytest.fixture
def launched(monkeypatch):
    """The signals and reductions that prompt passes asked the kernels for."""
    asked = []

    def launch(*arguments, real=prompt.launch):
        asked.append(arguments[-2:])
        return real(*arguments)

    monkeypatch.setattr(prompt, "launch", launch)
    return asked


def draw(columns, generator):
    shapes = [(2, heads, columns, GEOMETRY.head_dim) for heads in (6, 2, 2)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return [(2 * query, key, value)]


@pytest.mark.parametrize("text", POLICIES.values(), ids=POLICIES.keys())
def test_turns_of_ragged_rows(text, launched, device):
    """A first turn in two chunks, a token, and a turn that brings the second row less."""
    policy = loads_policy(f"kvpolicy: 1\nname: one\n{text}", filename="one")
    plan = make_plan(policy, GEOMETRY, batch=2, prompt=(12, 40), max_new_tokens=12)
    beside = Beside(plan, device=device, backend="triton")
    generator = torch.Generator().manual_seed(4)

    def feed(columns, valid=None, **how):
        given = [tuple(each.to(device) for each in layer) for layer in draw(columns, generator)]
        beside.feed(given, None if valid is None else valid.to(device), **how)

    feed(11, torch.arange(11) >= torch.tensor([[0], [4]]), kind="prompt", more=True)
    feed(9, kind="prompt")
    feed(1)
    feed(8, torch.arange(8) >= torch.tensor([[0], [5]]), kind="prompt")
    assert beside.agreement.compared == 3 * 2 * GEOMETRY.kv_heads  # settled passes, rows, heads
    assert len(set(launched)) == 1  # one way to ask, in every prompt pass
    assert {signal for signal, _ in launched} <= {"attention", "logits"}
