"""The files in patches/: what they say of themselves, and that no family escapes the parity tests."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import kvpolicy
from kvpolicy import ModelError
from kvpolicy.architecture import architectures, families
from kvpolicy.testing.models import random_model
from tests.patches.kit import MODEL_TYPES, REFUSED

ROOT = Path(__file__).parents[2]
PINNED = next(line[14:] for line in (ROOT / "constraints.txt").read_text().splitlines() if "transformers==" in line)


def test_every_file_is_a_family_and_every_family_is_tested():
    assert set(families()) >= {path.stem for path in (ROOT / "patches").glob("*.py")} - {"__init__"}
    known = sorted(each for family in families().values() for each in family.model_types)
    assert sorted(MODEL_TYPES + REFUSED) == known
    assert sorted(MODEL_TYPES) == sorted(architectures())


@pytest.mark.skipif(transformers.__version__ != PINNED, reason=f"asks of transformers {PINNED}")
def test_no_model_type_is_left_out_for_being_misspelt():
    assert set(MODEL_TYPES + REFUSED) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("name", families())
def test_a_family_says_which_models_are_of_it(name):
    assert families()[name].covers and families()[name].model_types


LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize("generic", [False, True])
def test_latent_attention_is_refused_by_name_with_the_reason(generic):
    model = random_model("deepseek_v3", **LATENT)
    with pytest.raises(ModelError, match=r"no policy .* type 'deepseek_v3': .* one compressed vector a token"):
        kvpolicy.apply(model, "h2o", generic=generic)
    assert model.generate(torch.arange(2, 9)[None], do_sample=False, max_new_tokens=2).shape == (1, 9)
