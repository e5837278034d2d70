"""The policies at two sizes, and the prompts, that the invariants are shown on."""

import importlib.util
import pathlib
import sys

import pytest
import torch

# Test modules are imported by path and are no package, so what they share is put where `import` finds it.
_path = pathlib.Path(__file__).with_name("policies.py")
_spec = importlib.util.spec_from_file_location("invariant_policies", _path)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["invariant_policies"] = _module
_spec.loader.exec_module(_module)


@pytest.fixture
def ragged():
    """A left-padded batch (ids, mask) of rows with 27, 9 and 18 tokens."""
    lengths = torch.tensor([27, 9, 18])
    ids = torch.randint(2, 97, (3, 27), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(27) >= 27 - lengths[:, None]).long()
    return ids * mask, mask
