"""Keys and values in 8 and 4 bits: what storing them costs, and attention over them against dequantising first."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from kvpolicy.attention import Formula, quantised
from kvpolicy.attention.kernels import library
from kvpolicy.attention.parts import attend_part
from kvpolicy.errors import UsageError

WAYS = list(itertools.product(quantised.BITS, quantised.BY))


@dataclass(frozen=True)
class Case:
    rows: int
    kv_heads: int
    group: int
    slots: int
    channels: int
    bits: int
    grouped: int
    keys_by: str = "channel"
    values_by: str = "token"
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    resident: int | None = None  # slots of the second row that hold something

    def tensors(self, device):
        """Query, stored keys, stored values, positions."""
        draw = torch.Generator().manual_seed(2)
        shape = (self.rows, self.kv_heads)
        query = torch.randn(*shape, self.group, self.channels, generator=draw).to(device, self.dtype)
        numbers = torch.randn(2, *shape, self.slots, self.channels, generator=draw)
        numbers[..., 3] *= 8  # an outlier channel, as keys have
        keys, values = (
            quantised.quantise(each.to(device, self.dtype), self.bits, self.grouped, by, self.stored)
            for each, by in zip(numbers, (self.keys_by, self.values_by), strict=True)
        )
        position = torch.stack([torch.randperm(self.slots, generator=draw) for _ in range(shape[0] * shape[1])])
        position = position.view(*shape, self.slots).int()
        if self.resident is not None:
            position[1, :, self.resident :] = -1
        return query, keys, values, position.to(device)


BASE = Case(1, 1, 2, 40, 16, 8, 8)
CASES = {
    "8 bits": BASE,
    "4 bits": replace(BASE, bits=4),
    "a group of 4, several parts": Case(1, 2, 4, 530, 32, 4, 64),
    "a group of 3, short last groups": Case(2, 1, 3, 77, 80, 4, 32, resident=50),
    "8 bits, short last groups": Case(2, 1, 3, 77, 80, 8, 32, resident=50),
    "a group of 8": Case(1, 1, 8, 65, 128, 8, 64, resident=None),
    "an empty row": replace(BASE, rows=2, resident=0, bits=4),
    "both by token": replace(BASE, keys_by="token", slots=70),
    "both by channel": replace(BASE, values_by="channel", slots=70, bits=4),
    "the other way round": replace(BASE, keys_by="token", values_by="channel", grouped=7, bits=4),
    "a tile in a group": Case(1, 1, 1, 150, 16, 8, 128, values_by="channel", stored=torch.float16),
    "bf16": Case(2, 1, 4, 70, 64, 4, 32, dtype=torch.bfloat16, stored=torch.bfloat16, resident=33),
    "fp16": Case(1, 1, 1, 70, 80, 8, 16, dtype=torch.float16, stored=torch.float16),
}
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request):
    return request.param


def operate(query, keys, values, position, scaling):
    parts = ([each.codes, each.scale, each.zero] for each in (keys, values))
    return library.attend_quantised(query, *parts, position, keys.bits, keys.group, keys.by, values.by, scaling)


def test_attention_over_what_is_stored(case, device):
    query, keys, values, position = case.tensors(device)
    scaling = case.channels**-0.5
    out, log_sum = operate(query, keys, values, position, scaling)
    opened = (quantised.dequantise(each, case.dtype).float() for each in (keys, values))
    wanted, wanted_sum = attend_part(query.float(), *opened, position < 0, Formula(scaling))
    assert out.dtype == query.dtype and out.shape == wanted.shape
    largest = wanted.abs().max().item()  # an outlier channel's: what other shares of it cancel is rounded as it is
    torch.testing.assert_close(out.float(), wanted, rtol=CLOSE[case.dtype], atol=CLOSE[case.dtype] * max(1, largest))
    known = 5e-3 if case.dtype == torch.bfloat16 else 1e-5  # the interpreter multiplies float32 for want of bf16
    torch.testing.assert_close(log_sum, wanted_sum, rtol=known, atol=known)


def test_empty_slots_may_hold_anything(device):
    query, keys, values, position = CASES["a group of 3, short last groups"].tensors(device)
    wanted = operate(query, keys, values, position, 0.1)
    for each in (keys, values):
        each.codes[position < 0] = 255
    values.scale[position < 0] = float("nan")
    assert all(map(torch.equal, operate(query, keys, values, position, 0.1), wanted))


def test_a_row_has_the_same_bits_in_every_batch(device):
    case = CASES["a group of 3, short last groups"]
    query, keys, values, position = case.tensors(device)
    both = operate(query, keys, values, position, 0.1)
    lone = [replace(each, codes=each.codes[1:], scale=each.scale[1:], zero=each.zero[1:]) for each in (keys, values)]
    alone = operate(query[1:], *lone, position[1:], 0.1)
    assert all(torch.equal(one, all_rows[1:]) for one, all_rows in zip(alone, both, strict=True))


@pytest.mark.parametrize(("bits", "by"), WAYS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 7, 32])
def test_a_number_is_off_by_half_a_step(bits, by, stored, group):
    numbers = torch.randn(2, 2, 40, 12, generator=torch.Generator().manual_seed(5)) * 3 + 1
    kept = quantised.quantise(numbers, bits, group, by, stored)
    axis = 2 if by == "channel" else 3
    wide = [
        each.float().repeat_interleave(group, axis).narrow(axis, 0, numbers.shape[axis])
        for each in (kept.scale, kept.zero)
    ]
    step, zero = wide
    rounded = torch.finfo(stored).eps * (zero.abs() + step * 2**bits) if stored != torch.float32 else 1e-6
    off = (quantised.dequantise(kept, torch.float32) - numbers).abs()
    assert (off <= step / 2 + rounded).all()
    assert stored != torch.float32 or off.max() > step.min() / 4 or group == 1  # and the bound is not a mile away


@pytest.mark.parametrize(("bits", "by"), WAYS)
def test_what_is_stored_is_this_large(bits, by):
    kept = quantised.quantise(torch.randn(2, 3, 70, 16), bits, 32, by)
    assert kept.codes.dtype == torch.uint8 and kept.codes.shape == (2, 3, 70, 16 * bits // 8)
    assert kept.scale.shape == kept.zero.shape == ((2, 3, 3, 16) if by == "channel" else (2, 3, 70, 1))


def test_halves_of_a_byte():
    """The low half is channel d, the high half channel d + D / 2."""
    kept = quantised.quantise(torch.tensor([0.0, 1.0, 14.0, 15.0]).view(1, 1, 1, 4), 4, 4, "token", torch.float32)
    assert kept.codes.flatten().tolist() == [0 | 14 << 4, 1 | 15 << 4]


def test_equal_numbers_stay_what_they_are():
    for by in quantised.BY:
        kept = quantised.quantise(torch.full((1, 1, 5, 4), 2.5), 4, 4, by)
        assert (quantised.dequantise(kept, torch.float32) == 2.5).all()


@pytest.mark.parametrize(
    ("bits", "group", "by", "channels", "why"),
    [
        (3, 8, "token", 8, "in 3 bits"),
        (4, 0, "token", 8, "in groups of 0"),
        (8, 8, "slot", 8, "by slot"),
        (4, 8, "token", 7, "which the head size 7 does not fill"),
    ],
)
def test_what_cannot_be_stored(bits, group, by, channels, why):
    with pytest.raises(UsageError, match=why):
        quantised.quantise(torch.randn(1, 1, 4, channels), bits, group, by)


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_the_operation_is_well_formed(interpreted, device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    query, keys, values, position = CASES["4 bits"].tensors(device)
    parts = ([each.codes, each.scale, each.zero] for each in (keys, values))
    arguments = (query, *parts, position, keys.bits, keys.group, keys.by, values.by, 0.25)
    torch.library.opcheck(torch.ops.kvpolicy.attend_quantised.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "stored"), [(4, torch.float16), (8, torch.float16), (8, torch.bfloat16)])
def test_a_long_text(bits, stored, device):
    """8k slots at the shape of an 8B model, KIVI's way."""
    case = Case(2, 8, 4, 8192, 128, bits, 64, dtype=torch.bfloat16, stored=stored, resident=5000)
    query, keys, values, position = case.tensors(device)
    out, log_sum = operate(query, keys, values, position, 0.088)
    opened = (quantised.dequantise(each, case.dtype).float() for each in (keys, values))
    wanted, wanted_sum = attend_part(query.float(), *opened, position < 0, 0.088)
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2 * max(1, wanted.abs().max().item()))
    torch.testing.assert_close(log_sum, wanted_sum, rtol=1e-4, atol=1e-4)
