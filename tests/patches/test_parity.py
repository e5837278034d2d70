"""Every family: with room for all tokens its logits are its own, with less it keeps what the oracle keeps."""

import pytest
import torch

import kvpolicy
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime.compiling import CompileReport
from tests.patches.kit import MODEL_TYPES, beside_the_oracle, build, unpatched, with_room
from tests.patching.test_apply_remove import portrait

pytestmark = pytest.mark.parametrize("model_type", MODEL_TYPES)

BFLOAT16 = 2.0**-4
"""What a score in bfloat16 may be off by: logits of some 16 are, by half a unit in their eighth bit."""

SHORT = 16
"""Steps where bfloat16 is looked at."""

FORMS = {"ernie4_5_moe": 2, "glm4_moe": 2, "qwen3_moe": 2, "smollm3": 2}
"""Of how many forms the layers of a small model are, where not all are alike: with experts or without, turning keys or
not."""


def forms(model_type):
    """Layers that see only what is near have graphs of their own."""
    local = ModelGeometry.from_config(build(model_type).base_model.config).local
    return FORMS.get(model_type, 2 if local else 1)


def off(logits, expected):
    """How far logits are off, as a share of the largest."""
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))


def test_with_room_for_everything_the_logits_are_the_unpatched_models(model_type):
    """In float32 to 1e-5; in bfloat16 they are as near to those as the unpatched model's own."""
    model = build(model_type)
    expected = unpatched(model)
    assert off(with_room(model), expected) < 1e-5
    model.to(torch.bfloat16)
    expected = unpatched(build(model_type), SHORT)
    own, got = (
        float((logits - expected).abs().mean()) for logits in (unpatched(model, SHORT), with_room(model, SHORT))
    )
    assert got < 2 * own, f"mean error {got:.3g} with a policy, {own:.3g} without"


@pytest.mark.parametrize("policy", ["h2o", pytest.param("raas", marks=pytest.mark.slow)])
def test_below_it_the_kept_tokens_are_the_oracles(model_type, policy):
    live = beside_the_oracle(build(model_type), policy, steps=24)
    layers, heads = len(live.cache.governed), live.cache.plan.geometry.kv_heads
    assert live.agreement.compared == 25 * 2 * layers * heads
    assert live.cache.stats()["evicted"] > 0
    assert len(live.agreement.near_ties) <= 1


def test_so_they_are_in_bfloat16(model_type):
    live = beside_the_oracle(build(model_type, torch.bfloat16), "h2o", steps=SHORT, relative=BFLOAT16)
    assert live.cache.stats()["evicted"] > 0
    assert len(live.agreement.near_ties) < 0.1 * live.agreement.compared


def compiled(model_type, backend):
    """What was compiled for plain steps and steps with update; the text is that of eager mode."""
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(3))
    greedy, sizes = {"do_sample": False, "max_new_tokens": 24}, {"budget": 28, "page_size": 4}
    model = build(model_type)
    with kvpolicy.applied(model, "raas", **sizes):
        expected = model.generate(ids, **greedy)
    kvpolicy.apply(model, "raas", **sizes, compile=backend)
    assert torch.equal(model.generate(ids, **greedy), expected)
    return kvpolicy.compile_report(model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_there_is_one_graph_for_each_kind_of_step(model_type, backend):
    torch._dynamo.reset()
    assert compiled(model_type, backend) == CompileReport(graphs=2 * forms(model_type))


def test_apply_then_remove_leaves_the_model_as_it_was(model_type):
    model = build(model_type)
    ids = torch.arange(2, 13)[None]
    model.generate(ids, do_sample=False, max_new_tokens=2)  # so that what transformers makes lazily is there already
    logits, before = unpatched(model), portrait(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kvpolicy.apply(model, "h2o", heavy=3, recent=2, compile="eager")
    model.generate(ids, do_sample=False, max_new_tokens=1)  # a prompt pass: nothing is compiled
    kvpolicy.remove(model)
    assert portrait(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(unpatched(model), logits)
