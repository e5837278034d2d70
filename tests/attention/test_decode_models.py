"""A whole model on the triton backend says what it says on the torch backend, eager and compiled."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy.language import Policy
from kvpolicy.patching import apply, cache_for, compile_report, remove
from tests.attention.interpreting import quick_interpreter
from tests.invariants.policies import tight

quick = pytest.fixture(autouse=True)(quick_interpreter)
POLICIES = {name: tight(name) for name in ("raas", "scope-slide")}


@pytest.fixture
def model(device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to(device)


def text(model: LlamaForCausalLM, new: int = 10) -> torch.Tensor:
    """What a left-padded prompt of two rows is continued with; greedily, so that a difference is seen."""
    prompt = torch.arange(1, 41, device=model.device).view(2, 20) % 63 + 1
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    tokens: torch.Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return tokens


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_generate_says_the_same(policy: Policy, model: LlamaForCausalLM) -> None:
    apply(model, policy, backend="torch", compile=False)
    wanted = text(model)
    remove(model)
    apply(model, policy, backend="triton", compile=False)
    cache = cache_for(model, prompt=20, max_new_tokens=10, batch=2)
    assert cache.backend == "triton" and all(layer.fused is not None for layer in cache.layers)
    assert torch.equal(text(model), wanted)


def test_compiled_it_is_one_graph_for_both_layers(model: LlamaForCausalLM) -> None:
    policy = POLICIES["scope-slide"]
    apply(model, policy, backend="triton", compile=False)
    wanted = text(model, 6)
    remove(model)
    apply(model, policy, backend="triton", compile="aot_eager")
    assert torch.equal(text(model, 6), wanted)
    report = compile_report(model)
    assert (report.graphs, report.graph_breaks, report.recompiles) == (1, 0, 0)
