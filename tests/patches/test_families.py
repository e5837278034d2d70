"""The files in patches/: what they say of themselves, and that no family escapes the parity tests."""

from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from kvpolicy.architecture import families
from tests.patches.kit import MODEL_TYPES

ROOT = Path(__file__).parents[2]
PINNED = next(line[14:] for line in (ROOT / "constraints.txt").read_text().splitlines() if "transformers==" in line)


def test_every_file_is_a_family_and_every_family_is_tested():
    assert set(families()) >= {path.stem for path in (ROOT / "patches").glob("*.py")} - {"__init__"}
    assert sorted(MODEL_TYPES) == sorted(each for family in families().values() for each in family.model_types)


@pytest.mark.skipif(transformers.__version__ != PINNED, reason=f"asks of transformers {PINNED}")
def test_no_model_type_is_left_out_for_being_misspelt():
    assert set(MODEL_TYPES) <= set(CONFIG_MAPPING_NAMES)


@pytest.mark.parametrize("name", families())
def test_a_family_says_which_models_are_of_it(name):
    assert families()[name].covers and families()[name].model_types
