"""Families that nobody has stated: tried, and patched with a warning; or refused by name, with the reason."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import kvpolicy
import kvpolicy.architecture as architecture
from kvpolicy import ModelError
from kvpolicy.errors import UntestedWarning
from kvpolicy.patching.generic import find_architecture
from kvpolicy.testing.live import LiveAgreement
from kvpolicy.testing.models import random_model
from tests.patching.test_apply_remove import portrait

TIGHT = {"heavy": 4, "recent": 4}


@pytest.fixture
def unknown(monkeypatch):
    """Families are forgotten, so that known ones can be found."""
    for module in ("patching.checks", "patching.patch", "architecture"):
        monkeypatch.setattr(f"kvpolicy.{module}.architectures", dict)


@pytest.mark.parametrize("model_type", sorted(architecture.architectures()))
def test_what_a_file_states_is_what_is_found(model_type):
    """Of every family that ships: the structure tells the same."""
    stated, found = architecture.architecture_of(model_type), find_architecture(random_model(model_type))
    for fact in ("decoder", "layers", "attention", "rotary"):
        assert getattr(found, fact) == getattr(stated, fact)


def test_an_unknown_family_is_refused_and_told_of_the_way_out():
    with pytest.raises(ModelError, match=r"does not know models of type 'bitnet'; .* --generic"):
        kvpolicy.apply(random_model("bitnet"), "h2o", **TIGHT)


def test_an_unknown_family_works_as_known_ones_do():
    model = random_model("bitnet")
    before, weights = portrait(model), [each.clone() for each in model.parameters()]
    with pytest.warns(UntestedWarning, match="type 'bitnet' and never tested one"):
        kvpolicy.apply(model.train(), "h2o", generic=True, **TIGHT)
    assert all(module.training for module in model.modules())
    live = LiveAgreement(model.eval(), prompt=12, max_new_tokens=20)
    ids = torch.randint(2, 90, (1, 32), generator=torch.Generator().manual_seed(1))
    live.feed(ids[:, :12])
    for at in range(12, 32):
        live.feed(ids[:, at : at + 1])
    assert live.agreement.compared == 21 * 3 * 2 and live.cache.stats()["evicted"] > 0
    assert model.generate(ids, do_sample=False, max_new_tokens=3).shape == (1, 35)
    kvpolicy.remove(model)
    assert portrait(model) == before
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_known_family_is_not_tried_and_warns_of_nothing(recwarn):
    kvpolicy.apply(random_model(), "h2o", generic=True, **TIGHT)
    assert not [each for each in recwarn if each.category is UntestedWarning]


LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip

REFUSED = {
    "nemotron": ({}, "layer 0, what the layer is given does not reach the attention interface"),
    "diffllama": ({}, "layer 0, what the layer is given reaches 2 times the attention interface"),
    "gpt2": ({"num_key_value_heads": 4}, "no cache is handed to it as past_key_values"),
    "bloom": ({}, "does not call its attention through transformers' attention interface"),
    "mamba": ({}, "no layer of this mamba model keeps tokens"),
    "axk1": (LATENT, "one compressed vector a token for all heads"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_patched_is_refused_by_name_with_the_reason(model_type):
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers does not know {model_type}")
    changes, reason = REFUSED[model_type]
    model = random_model(model_type, **changes)
    before = portrait(model)
    with pytest.raises(ModelError) as caught:
        kvpolicy.apply(model, "h2o", generic=True, **TIGHT)
    assert model_type in str(caught.value).lower() and reason in str(caught.value)
    assert portrait(model) == before


def test_a_silent_difference_is_found(unknown):
    """An attention that gives twice as much under a policy."""
    model = random_model()
    attention = type(model.model.layers[1].self_attn)
    own = attention.forward

    def doubled(self, hidden_states, **kwargs):
        out, weights = own(self, hidden_states, **kwargs)
        return out * (2 if "kv_layer" in kwargs else 1), weights

    another = type("OtherAttention", (attention,), {"forward": doubled})
    model.model.layers[1].self_attn.__class__ = another
    before = portrait(model)
    with pytest.raises(ModelError, match=r"with all tokens kept, its logits are off by 0\.\d+ of the largest"):
        kvpolicy.apply(model, "h2o", generic=True, **TIGHT)
    assert portrait(model) == before


def test_steps_are_compiled_where_layers_ask_for_no_more_than_a_step_gives(unknown):
    model = random_model()
    ids = torch.randint(2, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    with pytest.warns(UntestedWarning):
        kvpolicy.apply(model, "h2o", generic=True, compile="eager", **TIGHT)
    model.generate(ids, do_sample=False, max_new_tokens=4)
    assert kvpolicy.compile_report(model).graphs == 1
    with pytest.raises(ModelError, match=r"OPTForCausalLM ask for more .* compile=False"):
        opt = random_model("opt", num_key_value_heads=4, ffn_dim=48, word_embed_proj_dim=32)
        kvpolicy.apply(opt, "h2o", generic=True, compile="eager", **TIGHT)
