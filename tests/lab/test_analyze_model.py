"""Analysing a live model: what is heard is what the model attends with, and what is said of it adds up."""

from typing import Any

import numpy as np
import pytest
import torch

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.analyze.classes import sort
from kvpolicy.lab.analyze.facts import PARTS, PROMPT, facts
from kvpolicy.lab.analyze.reading import Passage, passage, read, written
from kvpolicy.lab.analyze.rules import JUDGED, Kind, Rules
from kvpolicy.lab.analyze.stream import Stream
from kvpolicy.lab.analyze.summary import (
    HEAD_KINDS,
    Analysis,
    Shares,
    intervals,
    kinds_of,
    life_quantile,
    survival,
    to_dict,
)  # fmt: skip
from kvpolicy.lab.running import Request
from kvpolicy.models import load_model
from kvpolicy.models.tiny.task import make_problem

RULES = Rules(local=8, silence=24)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny", device="cpu")


@pytest.fixture(scope="module")
def texts(tiny: tuple[Any, Any]) -> list[Passage]:
    problems = [make_problem(seed) for seed in range(3)]
    return [
        passage(tiny[1], f"problem {number}", Request(problem.prompt), " ".join(problem.answer(160)))
        for number, problem in enumerate(problems)
    ]


@pytest.fixture(scope="module")
def analysis(tiny: tuple[Any, Any], texts: list[Passage]) -> Analysis:
    found = [facts(text.name, text.prompt, read(tiny[0], text, RULES), RULES.local, 2) for text in texts]
    return Analysis("builtin:tiny", RULES, (0, 1), (0, 1), tuple(found))


def test_classes_are_those_of_the_models_own_attention(
    tiny: tuple[Any, Any], texts: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in pieces and heard as queries and keys, against the maps that the model itself gives out."""
    monkeypatch.setattr("kvpolicy.lab.analyze.reading.PIECE", 50)
    model, text = load_model("builtin:tiny", device="cpu")[0], texts[0]
    heard = read(model, text, RULES)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(text.ids, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        stream = Stream(4, RULES)
        stream.see(weights[0])
        own = sort(stream.notes(), RULES)
        assert (heard[layer].kind == own.kind).mean() > 0.995  # a look at the very threshold may be rounded away
        np.testing.assert_allclose(heard[layer].old_mass, own.old_mass, atol=1e-3)
        np.testing.assert_allclose(heard[layer].new_mass, own.new_mass, atol=1e-3)


def test_the_model_is_as_it_was(tiny: tuple[Any, Any], texts: list[Passage]) -> None:
    model = tiny[0]
    before = model(texts[0].ids[:, :40]).logits
    read(model, texts[0], RULES, [1])
    torch.testing.assert_close(model(texts[0].ids[:, :40]).logits, before, rtol=0, atol=0)
    assert model.config._attn_implementation == "sdpa"


def test_a_phrase_that_is_said_again_wakes_the_prompts(analysis: Analysis) -> None:
    """What the tiny model was trained for: each word of the phrase matters late, in its second layer."""
    text = analysis.texts[0]
    woken = text.silences.at[(text.silences.token < text.prompt) & (text.silences.layer == 1)]
    assert (woken >= text.prompt).sum() >= 12
    assert analysis.woken_late()[0] > 0


def test_what_is_counted_adds_up(analysis: Analysis) -> None:
    for text in analysis.texts:
        np.testing.assert_array_equal(text.counts.sum(-1)[..., PROMPT], text.prompt)
        np.testing.assert_array_equal(text.counts.sum((-1, -2)), text.length)
        np.testing.assert_allclose(text.attention.sum(-1), 1)
        assert len(text.lives) == text.counts[..., Kind.MILESTONE].sum()
        assert len(text.silences) == text.counts[..., Kind.PHOENIX].sum()
        assert (text.silences.queries >= RULES.silence).all()
        assert (text.in_use <= text.with_phoenixes).all()
        assert text.in_use.shape == (2, 2)
        assert (text.in_use <= text.length - text.prompt - RULES.local).all()
    for shares in (analysis.head_shares(), analysis.layer_shares(), analysis.shares()):
        np.testing.assert_allclose(shares.value.sum(-1), 1)
        assert (shares.low <= shares.value).all()
        assert (shares.value <= shares.high).all()
    assert (analysis.shares().low < analysis.shares().high).any()


def test_what_machines_get_is_whole(analysis: Analysis) -> None:
    said = to_dict(analysis)
    assert set(said["classes"]) == {kind.word for kind in JUDGED}
    assert len(said["heads"]) == 8
    assert {head["kind"] for head in said["heads"]} <= set(HEAD_KINDS)
    assert said["intervals"] == {"level": 0.95, "over": "texts"}
    assert 0 < said["heads_of_same_kind_in_two_texts"]["share"] <= 1
    assert sum(said["attention"].values()) == pytest.approx(1, abs=1e-4)


def test_kinds_of_heads() -> None:
    def parts(**given: float) -> np.ndarray:
        return np.array([given.get(name.replace("-", "_"), 0.0) for name in PARTS])

    cases = [
        parts(sink=0.5, window=0.45, phoenix=0.05), parts(sink=0.5, heavy_hitter=0.3, rest=0.2),
        parts(window=0.6, milestone=0.4), parts(phoenix=1.0), parts(sink=0.6, rest=0.4),
    ]  # fmt: skip
    assert [HEAD_KINDS[kind] for kind in kinds_of(np.stack(cases), 0.9)] == list(HEAD_KINDS)


def test_intervals_over_texts_widen_with_what_differs_between_them() -> None:
    alike, unlike = np.array([[50, 50]] * 6), np.array([[10, 90], [90, 10]] * 3)
    widths = [float((shares.high - shares.low)[0]) for shares in (intervals(alike), intervals(unlike))]
    assert widths[0] == 0 < 0.3 < widths[1]
    single = intervals(np.array([[8, 92]]))
    assert single.low[0] == pytest.approx(0.0411, abs=1e-3)  # Wilson, 8 of 100
    assert single.high[0] == pytest.approx(0.1500, abs=1e-3)
    assert isinstance(single, Shares)


def test_lives_that_did_not_end_count_as_long_as_they_were_seen() -> None:
    life, ended = np.array([10, 20, 20, 30, 40]), np.array([True, True, False, True, False])
    times, lasting = survival(life, ended)
    np.testing.assert_array_equal(times, [10, 20, 30, 40])
    np.testing.assert_allclose(lasting, [0.8, 0.6, 0.3, 0.3])
    assert life_quantile(life, ended, 0.5) == 30
    assert life_quantile(life, ended, 0.9) is None


def test_the_model_writes_what_it_is_asked_to_read(tiny: tuple[Any, Any]) -> None:
    problem, told = make_problem(5), []
    text = written(*tiny, "mine", Request(problem.prompt, 20), write=told.append)
    assert (text.prompt, text.length) == (78, 98)
    assert "".join(told).split() == problem.answer(20)


def test_texts_that_cannot_be_judged_are_refused(tiny: tuple[Any, Any], texts: list[Passage]) -> None:
    model = tiny[0]
    short = Passage("a note", texts[0].ids[:, :100], 20)
    with pytest.raises(UsageError, match=r"a note has 100 tokens, .* fewer than 169 can be judged"):
        read(model, short, Rules())
    with pytest.raises(ModelError, match="layer 7 is not there"):
        read(model, texts[0], RULES, [7])
    with pytest.raises(ModelError, match="shorten it"):
        read(model, Passage("endless", torch.zeros(1, 70_000, dtype=torch.long), 1), RULES)


def test_a_text_may_be_cut(tiny: tuple[Any, Any]) -> None:
    cut = passage(tiny[1], "cut", Request("hum hum hum owl"), "red tin sky", 3)
    assert (cut.prompt, cut.length) == (3, 3)
