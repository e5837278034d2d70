"""The total order, hits, smoothing and drawn numbers: the small parts that decide who leaves."""

import itertools
import random

import numpy as np
import pytest
import torch

from kvpolicy.language import Quantity
from kvpolicy.runtime.pool import FIRST_KEY, LAST_KEY, best, order_keys, smoothed
from kvpolicy.scorers.place import drawn


def test_keys_order_by_score_then_by_position() -> None:
    scores = [0.0, -0.0, 1e-30, -1e-30, 3.5, -3.5, float("inf"), float("-inf"), 1.0000001, 1.0]
    pairs = [(score, place) for score, place in itertools.product(scores, (0, 7, 2_000_000))]
    random.Random(0).shuffle(pairs)
    score, place = (torch.tensor(column) for column in zip(*pairs, strict=True))
    keys = order_keys(score, place, torch.ones_like(place, dtype=torch.bool), LAST_KEY)
    by_key = [pairs[i] for i in keys.argsort().tolist()]
    assert by_key == sorted(pairs, key=lambda pair: (float(np.float32(pair[0])) + 0.0, pair[1]))
    assert len(set(keys.tolist())) == len(pairs) - 3  # 0.0 and -0.0 are one score: three equal keys, no more


def test_what_may_not_go_sorts_last_and_what_may_not_win_sorts_first() -> None:
    score, place = torch.tensor([float("-inf"), float("inf")]), torch.tensor([0, 1])
    nobody = torch.zeros(2, dtype=torch.bool)
    assert order_keys(score, place, nobody, LAST_KEY).tolist() == [LAST_KEY, LAST_KEY]
    assert order_keys(score, place, nobody, FIRST_KEY).tolist() == [FIRST_KEY, FIRST_KEY]


def test_hits_are_the_ceiled_share_of_what_is_ranked_and_the_newer_wins_a_tie() -> None:
    score = torch.tensor([[[1.0, 1.0, 1.0, 5.0, 9.0]]])
    place = torch.tensor([[[3, 9, 6, 1, 2]]])
    ranked = torch.tensor([[[True, True, True, True, False]]])
    half = Quantity.parse("50%").tree
    assert best(score, place, ranked, half, {}).tolist() == [[[False, True, False, True, False]]]
    none = Quantity.parse("0").tree
    assert not best(score, place, ranked, none, {}).any()
    everyone = Quantity.parse("3").tree  # more than all of them
    assert best(score, place, ranked, everyone, {}).equal(ranked)


def test_smoothing_runs_over_candidates_in_order_of_position_with_zeros_at_the_ends() -> None:
    score = torch.tensor([[[4.0, -8.0, 2.0, 6.0]]])
    place = torch.tensor([[[30, 10, 20, 40]]])
    candidate = torch.tensor([[[True, False, True, True]]])
    # in order of position: 2 (20), 4 (30), 6 (40)
    mean = smoothed(score, place, candidate, "mean", 3)
    assert mean[0, 0, [2, 0, 3]].tolist() == pytest.approx([2.0, 4.0, 10 / 3])
    negative = smoothed(torch.tensor([[[-4.0, 0.0, -2.0, -6.0]]]), place, candidate, "max", 3)
    assert negative[0, 0, [2, 0, 3]].tolist() == [0.0, -2.0, 0.0]  # the padding is 0, not minus infinity


def hash64(*numbers: int) -> int:
    """Splitmix64's finaliser chained over integers, on Python's own."""
    mask, h = (1 << 64) - 1, 0
    for number in numbers:
        z = h ^ ((number + 0x9E3779B97F4A7C15) & mask)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        h = z ^ (z >> 31)
    return h


def test_drawn_numbers_are_the_hash_of_seed_layer_head_and_position() -> None:
    heads, places = torch.arange(3)[None, :, None], torch.tensor([[[0, 1, 77, 100_000]]])
    for seed, layer in ((0, 0), (7, 29), (123456789, 3)):
        got = drawn(seed, torch.tensor(layer), heads, places.expand(1, 3, 4))
        for head in range(3):
            for i, place in enumerate(places[0, 0].tolist()):
                assert got[0, head, i] == (hash64(seed, layer, head, place) >> 40) / 2**24
    assert 0.4 < float(drawn(1, torch.tensor(0), torch.zeros(1, dtype=torch.long), torch.arange(4000)).mean()) < 0.6
