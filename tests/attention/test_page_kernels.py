"""Attention over selected pages, through an index, against gathering them first."""

from dataclasses import dataclass

import pytest
import torch

from kvpolicy.attention import Formula, paged
from kvpolicy.attention.kernels import library
from kvpolicy.attention.parts import attend_part, merge_parts


@dataclass(frozen=True)
class Case:
    rows: int
    kv_heads: int
    group: int
    page: int
    units: int  # pages that there are
    chosen: int  # and that are read
    channels: int
    dtype: torch.dtype = torch.float32
    missing: int = 0  # entries of the index that name no page
    empty: int = 0  # slots at the end of every page that hold nothing

    def tensors(self, device):
        """Query, keys, values, positions by slot and an index of pages, each row's and head's own."""
        draw = torch.Generator().manual_seed(1)
        slots = self.page * self.units
        shape = (self.rows, self.kv_heads)
        query = torch.randn(*shape, self.group, self.channels, generator=draw)
        keys, values = torch.randn(2, *shape, slots, self.channels, generator=draw)
        position = torch.arange(slots, dtype=torch.int32).repeat(*shape, 1)
        position[torch.arange(slots).expand(*shape, -1) % self.page >= self.page - self.empty] = -1
        index = torch.rand(*shape, self.units, generator=draw).argsort(-1)[..., : self.chosen].int()
        index[..., : self.missing] = -1
        query, keys, values = (each.to(device, self.dtype) for each in (query, keys, values))
        return query, keys, values, position.to(device), index.to(device), self.page, self.channels**-0.5


CASES = {
    "one page": Case(1, 1, 1, 16, 3, 1, 16),
    "a group of 4, several parts": Case(1, 2, 4, 16, 40, 33, 64),
    "a group of 3, odd pages": Case(2, 2, 3, 5, 30, 21, 80),
    "a group of 8, some missing": Case(2, 1, 8, 7, 9, 6, 128, missing=2),
    "pages half empty": Case(1, 1, 2, 4, 9, 5, 16, empty=2),
    "pages of one slot": Case(2, 1, 2, 1, 300, 290, 16),
    "no page": Case(1, 2, 2, 4, 9, 5, 16, missing=5),
    "bf16": Case(2, 1, 4, 16, 20, 19, 64, dtype=torch.bfloat16, missing=1),
    "fp16": Case(1, 1, 1, 16, 5, 3, 80, dtype=torch.float16),
}
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request):
    return request.param


def close(found, wanted, dtype):
    torch.testing.assert_close(found.float(), wanted.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


def by_torch(*given):
    """What defines them."""
    *tensors, scaling = given
    return paged.attend_pages(*tensors, Formula(scaling))


def test_selected_pages(case, device):
    query, keys, values, *rest = case.tensors(device)
    out, log_sum = library.attend_pages(query, keys, values, *rest)
    wanted, wanted_sum = by_torch(query.float(), keys.float(), values.float(), *rest)
    assert out.dtype == query.dtype and log_sum.dtype == torch.float32
    assert out.shape == wanted.shape and log_sum.shape == wanted_sum.shape
    close(out, wanted, case.dtype)
    torch.testing.assert_close(log_sum, wanted_sum, rtol=1e-5, atol=1e-5)


def test_every_page_is_all_slots(device):
    """The torch function against plain attention, which knows nothing of pages."""
    case = Case(2, 2, 3, 5, 13, 13, 16, empty=1)
    query, keys, values, position, index, page, scaling = case.tensors(device)
    for attend in (library.attend_pages, by_torch):
        out, log_sum = attend(query, keys, values, position, index, page, scaling)
        wanted, wanted_sum = attend_part(query, keys, values, position < 0, Formula(scaling))
        close(out, wanted, torch.float32)
        close(log_sum, wanted_sum, torch.float32)


def test_nothing_else_is_read(device):
    query, keys, values, position, index, page, scaling = CASES["a group of 3, odd pages"].tensors(device)
    wanted = library.attend_pages(query, keys, values, position, index, page, scaling)
    chosen = torch.zeros(*index.shape[:2], keys.shape[2] // page, dtype=torch.bool, device=device)
    chosen.scatter_(2, index.long(), True)
    others = ~chosen.repeat_interleave(page, dim=2)[..., None]
    keys, values = (each.masked_fill(others, float("nan")) for each in (keys, values))
    found = library.attend_pages(query, keys, values, position, index, page, scaling)
    assert all(map(torch.equal, found, wanted))


def test_a_span_of_a_wider_buffer(device):
    query, keys, values, position, index, page, scaling = CASES["a group of 4, several parts"].tensors(device)
    wider = [torch.nn.functional.pad(each, (0, 0, 32, 7)) for each in (keys, values)]
    spans = [each[:, :, 32:-7] for each in wider]
    found = library.attend_pages(query, *spans, position, index, page, scaling)
    assert all(map(torch.equal, found, library.attend_pages(query, keys, values, position, index, page, scaling)))


def test_a_row_has_the_same_bits_in_every_batch(device):
    query, keys, values, position, index, page, scaling = CASES["a group of 3, odd pages"].tensors(device)
    both = library.attend_pages(query, keys, values, position, index, page, scaling)
    alone = library.attend_pages(query[1:], keys[1:], values[1:], position[1:], index[1:], page, scaling)
    assert all(torch.equal(one, all_rows[1:]) for one, all_rows in zip(alone, both, strict=True))


def test_parts_put_together(case, device):
    """Half of the pages and the other half make all of them: how a pool that selects joins one that does not."""
    query, keys, values, position, index, page, scaling = case.tensors(device)
    half = index.shape[2] // 2
    halves = [
        library.attend_pages(query, keys, values, position, some.contiguous(), page, scaling)
        for some in (index[..., :half], index[..., half:])
    ]
    out, log_sum = merge_parts(*zip(*halves, strict=True))
    wanted, wanted_sum = by_torch(query.float(), keys.float(), values.float(), position, index, page, scaling)
    assert out.dtype == query.dtype
    close(out, wanted, case.dtype)
    torch.testing.assert_close(log_sum, wanted_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_the_operation_is_well_formed(interpreted, device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    for name in ("one page", "pages of one slot"):
        torch.library.opcheck(torch.ops.kvpolicy.attend_pages.default, CASES[name].tensors(device))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_pages_of_a_long_text(rows, device):
    """128 pages of 16 out of 32k tokens, at the shape of an 8B model."""
    case = Case(rows, 8, 4, 16, 2048, 128, 128, dtype=torch.bfloat16)
    query, keys, values, *rest = case.tensors(device)
    out, log_sum = library.attend_pages(query, keys, values, *rest)
    wanted, wanted_sum = by_torch(query.float(), keys.float(), values.float(), *rest)
    close(out, wanted, case.dtype)
    torch.testing.assert_close(log_sum, wanted_sum, rtol=1e-4, atol=1e-4)
