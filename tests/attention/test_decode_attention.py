"""The decode kernels' attention against the torch backend's: output and logits, over shapes, types and holes."""

import pytest
import torch
from torch import Tensor

from kvpolicy.attention import Formula
from kvpolicy.attention.kernels import launch
from kvpolicy.attention.kernels.constants import Splits
from kvpolicy.attention.kernels.ops import attend_slots
from kvpolicy.attention.torch_backend import attend_slots as expected_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def slots(
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    filled: float = 0.6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query [B, K, G, D], keys and values [B, K, S, D], position [B, K, S]; empty slots hold what is not a number."""
    rows, heads, group, size, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = [torch.randn(rows, heads, n, width, generator=generator) for n in (group, size, size)]
    resident = torch.rand(rows, heads, size, generator=generator) < filled
    resident[..., torch.randint(size, (1,), generator=generator)] = True
    position = torch.where(resident, torch.randperm(size, generator=generator), -1).int()
    for stored in numbers[1:]:
        stored.masked_fill_(~resident[..., None], float("nan"))
    query, keys, values = (tensor.to(device, dtype) for tensor in numbers)
    return query, keys, values, position.to(device)


def compare(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, tolerance: float | None = None) -> None:
    scaling = query.shape[-1] ** -0.5
    out, logits = attend_slots(query, keys, values, position, scaling, True)
    clean = (tensor.float().nan_to_num(0.0) for tensor in (query, keys, values))
    wanted, wanted_logits, _ = expected_attention(*clean, position < 0, Formula(scaling))
    resident = (position >= 0).any(-1)[..., None, None]
    tolerance = tolerance or TOLERANCE[query.dtype]
    torch.testing.assert_close(out.float(), torch.where(resident, wanted, 0.0), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_groups_of_query_heads(group: int, device: torch.device) -> None:
    compare(*slots((1, 2, group, 70, 16), device))


@pytest.mark.parametrize("width", [16, 32, 64, 80, 96, 128, 192])
def test_head_sizes(width: int, device: torch.device) -> None:
    compare(*slots((1, 1, 3, 67, width), device))


@pytest.mark.parametrize("size", [1, 2, 15, 63, 64, 65, 129, 333])
def test_numbers_of_slots(size: int, device: torch.device) -> None:
    compare(*slots((2, 1, 2, size, 16), device))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_types(dtype: torch.dtype, device: torch.device) -> None:
    compare(*slots((2, 1, 4, 100, 64), device, dtype))


@pytest.mark.parametrize("processors", [1, 2, 5, 64])
def test_any_number_of_splits(processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    compare(*slots((1, 1, 4, 500, 32), device))


def test_splits_without_any_resident_and_empty_rows(device: torch.device) -> None:
    query, keys, values, position = slots((3, 1, 2, 500, 16), device)
    position[0, :, 64:] = -1
    position[1, :, :400] = -1
    position[2] = -1
    compare(query, keys, values, position)


def test_logits_too_large_for_a_naive_softmax(device: torch.device) -> None:
    query, keys, values, position = slots((1, 1, 2, 130, 16), device)
    compare(query * 100, keys, values, position, tolerance=1e-3)  # what float32 knows of a logit of some hundreds


def test_nobody_pays_for_logits_that_nobody_wants(device: torch.device) -> None:
    query, keys, values, position = slots((2, 2, 3, 70, 16), device)
    out, logits = attend_slots(query, keys, values, position, 0.25, False)
    both, _ = attend_slots(query, keys, values, position, 0.25, True)
    assert logits.shape == (2, 2, 3, 0)
    assert torch.equal(out, both)


def test_a_query_that_is_not_contiguous(device: torch.device) -> None:
    query, keys, values, position = slots((2, 2, 3, 70, 16), device)
    turned = query.transpose(2, 3).contiguous().transpose(2, 3)
    out, _ = attend_slots(turned, keys, values, position, 0.25, False)
    assert torch.equal(out, attend_slots(query, keys, values, position, 0.25, False)[0])


@pytest.mark.parametrize("cells", [1, 8, 512])
@pytest.mark.parametrize("size", [1, 64, 2049, 32768, 131072])
def test_splits_cover_the_slots_once(cells: int, size: int) -> None:
    splits = Splits.of(cells, size, 128, 132)
    assert (splits.count - 1) * splits.length < size <= splits.count * splits.length
    assert splits.length % splits.block == 0 and splits.length <= 8192


def test_the_op_keeps_its_contract(device: torch.device) -> None:
    query, keys, values, position = slots((1, 2, 2, 20, 16), device, filled=1.0)
    for wants_logits in (False, True):
        torch.library.opcheck(attend_slots, (query, keys, values, position, 0.25, wants_logits))
