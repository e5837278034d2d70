"""The prompts that the invariants are shown on."""

import pytest
import torch


@pytest.fixture
def ragged():
    """A left-padded batch (ids, mask) of rows with 27, 9 and 18 tokens."""
    lengths = torch.tensor([27, 9, 18])
    ids = torch.randint(2, 97, (3, 27), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(27) >= 27 - lengths[:, None]).long()
    return ids * mask, mask
