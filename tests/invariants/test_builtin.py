"""The same on the models that ship: real attention, real text, and thousands of steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvpolicy
from kvpolicy.models import load_model
from kvpolicy.testing.live import LiveAgreement
from tests.invariants.policies import EVICTING, NAMES, SHAPES, evicts, plan_of, roomy, thorough, tight

TEXT = (
    "The harbour master kept three ledgers. In the first she wrote the names of ships, in the second the weather, and "
    "in the third, which nobody else had ever opened, she wrote what the sailors had told her about the places where "
    "they had been. On the ninth of March a small grey ship came in without a flag, and its captain asked to see them."
)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny", device="cpu")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_model("builtin:smollm2", device="cpu")


@pytest.fixture
def patched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``patched(model, policy)`` applies a policy until the test ends."""
    models = []

    def patch(model: Any, policy: Any, **options: Any) -> Any:
        models.append(model)
        return kvpolicy.apply(model, policy, **options)

    yield patch
    for model in models:
        kvpolicy.remove(model)


def prompt_ids(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids
    while ids.shape[1] < length:
        ids = torch.cat([ids, ids], dim=1)
    return ids[:, :length]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_keeps_what_the_oracle_keeps_on_its_own_text(name: str, tiny: tuple[Any, Any], patched: Any) -> None:
    model, tokenizer = tiny
    patched(model, tight(name))
    live = LiveAgreement(model, prompt=32, max_new_tokens=80)
    ids = prompt_ids(tokenizer, "hum hum owl red tin sky fog hum hum cat hum oak hum hum hum owl", 32)
    for _ in range(81):
        ids = live.feed(ids).argmax(-1)
    assert name not in EVICTING or live.cache.stats()["evicted"] > 0
    assert live.cache.bytes == live.cache.plan.bytes


@pytest.mark.parametrize("name", thorough(among=SHAPES))
def test_tiny_with_room_for_everything_writes_the_same(name: str, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    ids = prompt_ids(tokenizer, "hum owl red tin sky fog hum hum hum owl", 24)
    expected = model.generate(ids, max_new_tokens=100, do_sample=False)
    with kvpolicy.applied(model, roomy(name)):
        assert model.generate(ids, max_new_tokens=100, do_sample=False).equal(expected)
        assert model.generate(ids, max_new_tokens=100, do_sample=False, custom_generate=kvpolicy.decode_loop).equal(
            expected
        )


@pytest.mark.smollm2
@pytest.mark.parametrize("name", thorough())
def test_smollm2_keeps_what_the_oracle_keeps(name: str, smollm2: tuple[Any, Any], patched: Any) -> None:
    """Real attention, with its sinks; every tenth layer is compared."""
    model, tokenizer = smollm2
    patched(model, tight(name))
    steps = 12 if evicts(plan_of(tight(name), 30, 12)) else 24  # what pins the prompt has room for some tokens more
    live = LiveAgreement(model, prompt=30, max_new_tokens=steps)
    ids = prompt_ids(tokenizer, TEXT, 30)
    for _ in range(1 + steps):
        ids = live.feed(ids, layers=[0, 10, 20, 29]).argmax(-1)
    assert live.agreement.compared >= (1 + steps) * 4 * 3  # chunks are compared too
    assert len(live.agreement.near_ties) <= live.agreement.compared // 50, live.agreement.summary()
    assert name not in EVICTING or live.cache.stats()["evicted"] > 0


def generated_logits(smollm2: tuple[Any, Any]) -> torch.Tensor:
    """Logits of eight greedy tokens after a prompt [8, 1, V]."""
    model, tokenizer = smollm2
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(prompt_ids(tokenizer, TEXT, 48), **options).logits)


@pytest.fixture(scope="module")
def own_logits(smollm2: tuple[Any, Any]) -> torch.Tensor:
    """Of the model as it is."""
    return generated_logits(smollm2)


@pytest.mark.smollm2
@pytest.mark.parametrize("name", thorough(among=SHAPES))
def test_smollm2_with_room_for_everything_has_its_own_logits(
    name: str, smollm2: tuple[Any, Any], own_logits: torch.Tensor
) -> None:
    with kvpolicy.applied(smollm2[0], roomy(name)):
        got = generated_logits(smollm2)
    assert (got - own_logits).abs().max() < 1e-4 * own_logits.abs().max()


LONG = {
    "raas": {"budget": 128, "page_size": 16},
    "scope-slide": {"alpha": 24, "beta1": 40, "beta2": 40},
    "scope-adaptive": {"alpha": 24, "beta1": 40, "beta2": 40, "horizon": 400},
    "scope-discontinuous": {"alpha": 24, "beta1": 40, "beta2": 40, "horizon": 400},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_five_thousand_compiled_steps(name: str, tiny: tuple[Any, Any], patched: Any) -> None:
    """One plain graph and one update graph, no break, no recompile, nothing grows, and the tokens are eager's."""
    model, tokenizer = tiny
    steps = 5000
    ids = prompt_ids(tokenizer, "hum hum owl red tin sky fog ice jam key map oil pan hum hum hum hum owl", 32)
    texts, reports = [], []
    for compiled in (False, True):
        patch = kvpolicy.apply(model, name, compile=compiled, **LONG[name])
        cache = kvpolicy.cache_for(patch, prompt=32, max_new_tokens=steps)
        texts.append(_decode(model, cache, ids, steps))
        reports.append(kvpolicy.compile_report(patch))
        kvpolicy.remove(model)
    eager, compiled_text = texts
    assert eager.equal(compiled_text), f"first difference at {int((eager != compiled_text).nonzero()[0])}"
    kinds = 2 if name in ("raas", "scope-discontinuous") else 1
    assert (reports[1].graphs, reports[1].graph_breaks, reports[1].recompiles) == (kinds, 0, 0)


def _decode(model: Any, cache: Any, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy tokens, made to vary by a fixed nudge; bytes and residents are watched on the way."""
    vocabulary = model.config.vocab_size
    nudge = torch.randn(97, vocabulary, generator=torch.Generator().manual_seed(0))
    written, held = [], set()
    with torch.no_grad():
        for step in range(steps + 1):
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            ids = (logits + nudge[step % 97]).argmax(-1, keepdim=True)
            written.append(ids)
            if step > 1000 and step % 250 == 0:
                held.add(int((cache.positions(0) >= 0).sum(-1).max()) // cache.plan.layers[0].pools[-1].page)
    assert cache.bytes == cache.plan.bytes
    assert max(held) - min(held) <= 16  # within one interval of the discontinuous cadence
    return torch.cat(written, dim=1)[0]
