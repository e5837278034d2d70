"""Prompt scores by kernel against the torch backend: shapes, groups, turns, padding, empty rows."""

from dataclasses import dataclass

import pytest
import torch

from kvpolicy.attention import Formula, columns
from kvpolicy.attention.kernels import library


@dataclass(frozen=True)
class Case:
    rows: int
    kv_heads: int
    group: int
    columns: int  # queries of the pass
    before: int  # slots of earlier turns
    channels: int
    padded: int = 0  # queries of the second row that are padding, on its left
    right: int = 0  # and on its right
    dtype: torch.dtype = torch.float32

    def tensors(self, device, seed=0):
        """Query, keys, positions of queries and slots; slots in no order, a few of them empty."""
        draw = torch.Generator().manual_seed(seed)
        query = torch.randn(self.rows, self.kv_heads * self.group, self.columns, self.channels, generator=draw)
        slots = self.before + self.columns
        keys = torch.randn(self.rows, self.kv_heads, slots + 3, self.channels, generator=draw)
        query_position = torch.arange(self.columns).repeat(self.rows, 1) + self.before
        key_position = torch.full((self.rows, self.kv_heads, slots + 3), -1)
        for row in range(self.rows):
            for head in range(self.kv_heads):
                order = torch.randperm(self.before, generator=draw)
                key_position[row, head, : self.before] = torch.where(order % 5 == 3, -1, order)
        key_position[:, :, self.before + 1 : -2] = torch.arange(self.before, slots)
        if self.rows > 1:
            query_position[1, : self.padded] = -1
            query_position[1, self.columns - self.right :] = -1
            left_out = (key_position[1] >= slots - self.right) | (
                (key_position[1] >= self.before) & (key_position[1] < self.before + self.padded)
            )
            key_position[1][left_out] = -1
        query, keys = query.to(device, self.dtype), keys.to(device, self.dtype)
        return query, keys, query_position.to(device), key_position.to(device), self.channels**-0.5


CASES = {
    "one head": Case(1, 1, 1, 5, 0, 16),
    "a group of 4, more than a block": Case(1, 2, 4, 70, 0, 32),
    "a group of 3, two turns": Case(2, 1, 3, 37, 66, 80),
    "a group of 8, padded": Case(2, 1, 8, 19, 9, 64, padded=7),
    "a group of 2, padded on both sides": Case(2, 2, 2, 41, 30, 128, padded=5, right=9),
    "an empty row": Case(2, 1, 2, 12, 0, 16, padded=12),
    "an empty row of a second turn": Case(2, 1, 2, 12, 11, 16, padded=12),
    "few queries, many slots": Case(1, 1, 4, 3, 700, 16),
    "bf16": Case(2, 2, 4, 33, 20, 64, padded=3, dtype=torch.bfloat16),
    "fp16": Case(1, 1, 1, 33, 0, 80, dtype=torch.float16),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request):
    return request.param


def check(found, tensors, compute, *how, tolerance=2e-5):
    """Against the torch backend in float32, as kernels multiply exactly and add up in float32 whatever is stored."""
    query, keys, *rest, scaling = tensors
    wanted = compute(query.float(), keys.float(), *rest, Formula(scaling), *how)
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", ["mean", "logits-max"])
def test_summed_attention(case, heads, device):
    tensors = case.tensors(device)
    found = library.prompt_scores(*tensors, "attention", heads)
    check(found, tensors, columns.prompt_scores, "attention", heads)


def test_a_sum_over_queries_is_their_number(case, device):
    """Each query's attention adds up to 1, or to 0 where it sees nothing."""
    query, keys, query_position, key_position, scaling = case.tensors(device)
    found = library.prompt_scores(query, keys, query_position, key_position, scaling, "attention", "each")
    sees = (key_position[:, :, None] >= 0) & (key_position[:, :, None] <= query_position[:, None, :, None])
    torch.testing.assert_close(found.sum(-1), sees.any(-1).sum(-1)[..., None].expand(found.shape[:3]).float())


@pytest.mark.parametrize("heads", columns.HEADS)
@pytest.mark.parametrize("signal", columns.SIGNALS)
def test_every_way_to_reduce(signal, heads, device):
    tensors = CASES["a group of 3, two turns"].tensors(device)
    found = library.prompt_scores(*tensors, signal, heads)
    check(found, tensors, columns.prompt_scores, signal, heads)


@pytest.mark.parametrize("last", [1, 4, 100])
def test_the_newest_queries_of_each_row(case, last, device):
    query, keys, query_position, *rest = case.tensors(device)
    newest, placed = columns.newest_queries(query, query_position, last)
    for row, position in enumerate(query_position.tolist()):
        wanted = sorted(place for place in position if place >= 0)[-last:]
        assert sorted(place for place in placed[row].tolist() if place >= 0) == wanted
    tensors = (newest, keys, placed, *rest)
    check(library.prompt_scores(*tensors, "attention", "mean"), tensors, columns.prompt_scores, "attention", "mean")


def test_a_row_has_the_same_bits_in_every_batch(device):
    query, keys, query_position, key_position, scaling = CASES["a group of 8, padded"].tensors(device)
    both = library.prompt_scores(query, keys, query_position, key_position, scaling, "attention", "mean")
    alone = library.prompt_scores(
        query[1:], keys[1:], query_position[1:], key_position[1:], scaling, "attention", "mean"
    )
    assert torch.equal(both[1:], alone)


def test_large_logits_stay_finite(device):
    """float32 knows a logit of some thousands to the fourth digit behind the point, and probabilities no better."""
    query, keys, *rest = CASES["a group of 2, padded on both sides"].tensors(device)
    found = library.prompt_scores(query * 40, keys * 40, *rest, "attention", "mean")
    check(found, (query * 40, keys * 40, *rest), columns.prompt_scores, "attention", "mean", tolerance=1e-3)


def test_what_need_not_be_contiguous(device):
    """Queries as a model lays them out, [B, N, Q, D] in memory, and a span of a wider buffer's slots."""
    query, keys, query_position, key_position, scaling = CASES["a group of 3, two turns"].tensors(device)
    laid_out = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = library.prompt_scores(
        laid_out, keys[:, :, 10:90], query_position, key_position[:, :, 10:90], scaling, "attention", "sum"
    )
    tensors = (query, keys[:, :, 10:90], query_position, key_position[:, :, 10:90], scaling)
    check(found, tensors, columns.prompt_scores, "attention", "sum")


def test_hidden_blocks_are_not_read(device):
    """Slots after every query are behind the last block that a query walks over: their keys may be anything."""
    query, keys, query_position, key_position, scaling = CASES["a group of 4, more than a block"].tensors(device)
    extra = 128  # two blocks
    keys = torch.nn.functional.pad(keys, (0, 0, 0, extra), value=float("nan"))
    key_position = torch.nn.functional.pad(key_position, (0, extra), value=10_000)
    found = library.prompt_scores(query, keys, query_position, key_position, scaling, "attention", "mean")
    assert torch.isfinite(found).all() and (found[..., -extra:] == 0).all()


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_the_operation_is_well_formed(interpreted, device, monkeypatch):
    """Its fake knows the shapes, it changes no argument, and a graph takes it whole: kernels and torch alike."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    tensors = CASES["one head"].tensors(device)
    for heads in ("mean", "each"):
        torch.library.opcheck(torch.ops.kvpolicy.prompt_scores.default, (*tensors, "attention", heads))


def test_a_compiled_function_keeps_the_operation(device):
    tensors = CASES["one head"].tensors(device)

    def doubled(*tensors):
        return 2 * library.prompt_scores(*tensors, "attention", "mean")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), doubled(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 32_768])
def test_a_long_prompt_makes_no_map(tokens, device):
    """At the shape of an 8B model; the map of 32k tokens would take 128 GiB."""
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(1, 32, tokens, 128, generator=generator, device=device, dtype=torch.bfloat16)
    keys = torch.randn(1, 8, tokens, 128, generator=generator, device=device, dtype=torch.bfloat16)
    position = torch.arange(tokens, device=device)[None]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = library.prompt_scores(query, keys, position, position[None].expand(1, 8, -1), 0.088, "attention", "each")
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    torch.testing.assert_close(found.sum(-1), torch.full((1, 8, 4), float(tokens), device=device), rtol=1e-4, atol=0)
    tail = slice(tokens - 64, None)
    newest = library.prompt_scores(
        query[:, :, tail], keys, position[:, tail], position[None].expand(1, 8, -1), 0.088, "attention", "each"
    )
    earlier = library.prompt_scores(
        query[:, :, : tokens - 64],
        keys,
        position[:, : tokens - 64],
        position[None].expand(1, 8, -1),
        0.088,
        "attention",
        "each",
    )
    torch.testing.assert_close(earlier + newest, found, rtol=1e-4, atol=1e-5)
