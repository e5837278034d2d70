"""Classes of tokens: what is planted is found, and what is noted of a token is what a look at the whole map gives."""

from typing import Any

import numpy as np
import pytest
import torch

from kvpolicy.errors import UsageError
from kvpolicy.lab.analyze.classes import sort
from kvpolicy.lab.analyze.planted import HEADS, WANTED, confusion, found, main, planted, precision_and_recall
from kvpolicy.lab.analyze.rules import JUDGED, Kind, Rules
from kvpolicy.lab.analyze.stream import BLOCK_BYTES, Stream, rows_of

SMALL = Rules(local=5, silence=7, first=2, times=1.5, least=0.02)


@pytest.mark.parametrize(("length", "noise"), [(400, 0.5), (600, 0.25)])
def test_what_is_planted_is_found(length: int, noise: float) -> None:
    table = confusion([found(seed, length, Rules(), noise) for seed in (11, 12)])
    assert (table.sum(axis=1)[list(JUDGED)] > 0).all(), "a class was not planted"
    for kind, scores in precision_and_recall(table).items():
        assert min(scores) >= WANTED, f"{kind.word}: precision and recall {scores}"


def test_windows_and_silences_of_other_lengths_are_found_as_well() -> None:
    table = confusion([found(seed, 500, Rules(local=16, silence=40)) for seed in (1, 2)])
    assert all(min(scores) >= WANTED for scores in precision_and_recall(table).values())


def test_the_proof_fails_where_the_classifier_is_blind(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["--seeds", "1", "--lengths", "400", "--noise", "0.25"]) == 0
    monkeypatch.setattr("kvpolicy.lab.analyze.planted.sort", lambda notes, rules: sort(notes, Rules(mostly=1.0)))
    notes = Stream._note
    monkeypatch.setattr(Stream, "_note", lambda self, *looks: notes(self, *(look[::3] for look in looks)))
    assert main(["--seeds", "1", "--lengths", "400", "--noise", "0.25"]) == 1
    assert "BELOW" in capsys.readouterr().out


def attention(seed: int, heads: int = 3, length: int = 90) -> np.ndarray:
    """[H, T, T] with tokens that stand out at times."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(heads, length, length)) + 3 * (random.random((heads, length, length)) < 0.05)
    logits[:, :, 7] += 3 * (np.arange(length) % 23 < 3)
    logits[:, ~np.tri(length, dtype=bool)] = -np.inf
    weights = np.exp(logits)
    return weights / weights.sum(-1, keepdims=True)


def slowly(weights: np.ndarray, rules: Rules) -> dict[str, np.ndarray]:
    """What is to be noted, from the whole map, token by token."""
    heads, length, _ = weights.shape
    said = {name: np.zeros((heads, length)) for name in ("looks", "last", "gap", "wakes", "woke", "paid", "new", "old")}
    for head in range(heads):
        for token in range(length):
            last = max(token + rules.local - 1, rules.begin - 1)
            looks, gaps, woke = 0, [0], -1
            for query in range(token, length):
                weight = weights[head, query, token]
                if query - token < rules.local:
                    said["paid"][head, token] += weight
                if query >= rules.begin:
                    said["new" if query - token < rules.local else "old"][head, token] += weight
                if query - token < rules.local:
                    continue
                middle = weights[head, query, rules.first : query - rules.local + 1]
                if query < rules.begin or weight < max(rules.least, rules.times * middle.sum() / len(middle)):
                    continue
                gap, looks, last = query - last - 1, looks + 1, query
                gaps.append(gap)
                woke = query if gap >= rules.silence else woke
            values = looks, last, max(gaps), sum(gap >= rules.silence for gap in gaps), woke
            for name, value in zip(("looks", "last", "gap", "wakes", "woke"), values, strict=True):
                said[name][head, token] = value
    return said


@pytest.mark.parametrize("steps", [(90,), (1,) * 90, (40, 1, 1, 9, 39)], ids=["at once", "row by row", "in pieces"])
def test_what_is_noted_is_what_the_whole_map_says(steps: tuple[int, ...]) -> None:
    weights, stream, end = attention(3), Stream(3, SMALL), 0
    for step in steps:
        begin, end = end, end + step
        stream.see(weights[:, begin:end, :end])
    notes, expected = stream.notes(), slowly(weights, SMALL)
    assert expected["looks"].sum() > 50
    assert (expected["wakes"] > 0).any()
    for name in ("looks", "last", "gap", "wakes", "woke"):
        np.testing.assert_array_equal(getattr(notes, name), expected[name], err_msg=name)
    for name in ("paid", "new", "old"):
        given = getattr(notes, name if name == "paid" else f"{name}_mass")
        np.testing.assert_allclose(given, expected[name], atol=1e-12, err_msg=name)
    np.testing.assert_allclose((notes.new_mass + notes.old_mass).sum(axis=1), 90 - SMALL.begin)


def test_rows_are_the_softmax_of_products_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(4, 10, 8), torch.randn(2, 30, 8)
    logits = torch.einsum("hnd,htd->hnt", query, key.repeat_interleave(2, 0)) * 0.3
    whole = logits.masked_fill(torch.ones(10, 30).triu(21).bool(), -torch.inf).softmax(-1)
    monkeypatch.setattr("kvpolicy.lab.analyze.stream.BLOCK_BYTES", 4 * 4 * 30 * 3)
    blocks = list(rows_of(query, key, 0.3))
    assert [block.shape[1] for block in blocks] == [3, 3, 3, 1]
    assert max(block.numel() * 4 for block in blocks) <= 4 * 4 * 30 * 3 < BLOCK_BYTES
    for number, block in enumerate(blocks):
        torch.testing.assert_close(block, whole[:, 3 * number : 3 * number + block.shape[1], : block.shape[2]])


def test_a_row_that_is_left_out_is_noticed() -> None:
    stream = Stream(3, SMALL)
    with pytest.raises(ValueError, match="after 0 tokens"):
        stream.see(attention(0)[:, 5:6, :6])


def test_what_is_planted_is_what_the_docstring_says() -> None:
    said, truth = planted(0, 400, Rules())
    assert said.geometry.query_heads == len(HEADS) == len(truth)
    assert set(truth[HEADS.index("milestones")].tolist()) == {Kind.SINK, Kind.MILESTONE, Kind.LAZY, Kind.UNJUDGED}


@pytest.mark.parametrize("given", [{"local": 0}, {"silence": 0}, {"times": 0.5}, {"least": 0.0}, {"mostly": 1.5}])
def test_thresholds_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rules(**given)
