"""Fidelity on given texts: the full cache agrees with itself, batches change nothing, and numbers are the model's."""

import math
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvpolicy.errors import ModelError
from kvpolicy.lab.dataset import Text
from kvpolicy.lab.fidelity.forcing import BLOCK, Forcing, Series, force
from kvpolicy.lab.fidelity.full_cache import Forced, Head, force_ids, full_states
from kvpolicy.lab.fidelity.summary import Blocks, curve, estimate
from kvpolicy.language import load_policy
from kvpolicy.models import load_model
from kvpolicy.models.tiny.task import make_problem
from kvpolicy.patching import applied, cache_for


@cache
def tiny() -> tuple[Any, Any]:
    return load_model("builtin:tiny")


@cache
def texts() -> list[Forced]:
    """Prompts of 40 to 46 tokens, outputs of 80 down to 65."""
    found = []
    for number in range(4):
        problem = make_problem(number, words=8 + number, hums=30 + number)
        said = " " + " ".join(problem.answer(80 - 5 * number))
        found.append(force_ids(tiny()[1], Text(number, problem.prompt, said, "here"), most=None))
    return found


@cache
def states() -> list[torch.Tensor]:
    return [full_states(tiny()[0], text) for text in texts()]


def forced(name: str, batch: int = 4, **params: Any) -> list[Series]:
    policy = load_policy(name)
    policy = policy.bind(**params) if params else policy
    return force(*tiny(), policy, texts(), states(), Forcing.of(texts(), batch=batch))


def test_ids_are_those_of_the_whole_text() -> None:
    tokenizer = tiny()[1]
    problem = make_problem(0)
    text = force_ids(tokenizer, Text(0, problem.prompt, " red owl tin", "here"), most=2)
    assert tokenizer.decode(text.output) == "red owl"
    assert len(text.ids) == len(text.prompt) + 1


def test_what_is_kept_of_the_full_cache_gives_its_logits() -> None:
    model, text = tiny()[0], texts()[0]
    with torch.no_grad():
        told = model(text.ids[None]).logits[0, len(text.prompt) - 1 :]
    assert torch.allclose(Head(model)(states()[0]), told, atol=1e-4)
    assert states()[0].shape == (len(text.output), model.config.hidden_size)


def test_a_model_that_does_more_after_its_last_layer_is_refused() -> None:
    model = tiny()[0]
    handle = model.register_forward_hook(lambda module, args, output: SimpleNamespace(logits=2 * output.logits))
    try:
        with pytest.raises(ModelError, match="does more after its last layer"):
            Head(model).check(model, texts()[0].ids)
    finally:
        handle.remove()
    Head(model).check(model, texts()[0].ids)


@pytest.mark.parametrize(("name", "params"), [("dense", {}), ("window", {"window": 400}), ("h2o", {"heavy": 300})])
def test_with_room_for_everything_a_policy_is_the_full_cache(name: str, params: dict[str, int]) -> None:
    for series in forced(name, **params):
        assert series.evicted == 0
        assert series.mean("kl") < 1e-6
        assert series.mean("top1") == 1
        assert series.mean("nll") == pytest.approx(series.mean("full_nll"), abs=1e-5)


def test_a_policy_decides_at_every_step_of_the_output() -> None:
    """The numbers are those of a loop over the patched model, one token at a time."""
    model, text = tiny()[0], texts()[1]
    policy = load_policy("h2o").bind(heavy=8, recent=8)
    with torch.no_grad():
        full = model(text.ids[None]).logits[0, len(text.prompt) - 1 :].log_softmax(-1)
        with applied(model, policy):
            kept = cache_for(model, prompt=len(text.prompt), max_new_tokens=len(text.output))
            said = [model(text.prompt[None], past_key_values=kept).logits[0, -1]]
            said += [model(token.view(1, 1), past_key_values=kept).logits[0, -1] for token in text.output[:-1]]
    found = torch.stack(said).log_softmax(-1)
    series = forced("h2o", heavy=8, recent=8)[1]
    assert series.evicted == kept.stats()["evicted"] > 0
    assert series.resident == kept.stats()["resident"]
    assert series.mean("kl") == pytest.approx(float((full.exp() * (full - found)).sum(-1).mean()), rel=1e-3)
    assert series.mean("kl") > 0.01
    assert series.mean("nll") == pytest.approx(-float(found.gather(-1, text.output[:, None]).mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["scope-slide", "random"])
def test_batches_change_nothing(name: str) -> None:
    sizes = {"scope-slide": {"alpha": 24, "alpha2": 4, "beta1": 6, "beta2": 6}, "random": {"budget": 60}}[name]
    alone, together, in_pairs = (forced(name, batch, **sizes) for batch in (1, 4, 3))
    for one, four, three in zip(alone, together, in_pairs, strict=True):
        assert one.evicted == four.evicted == three.evicted > 0
        assert one.resident == four.resident == three.resident
        assert one.count == four.count
        for measure in one.sums:
            assert one.sums[measure] == pytest.approx(four.sums[measure], rel=1e-3, abs=1e-4)
            assert one.sums[measure] == pytest.approx(three.sums[measure], rel=1e-3, abs=1e-4)


def test_blocks_cover_every_place() -> None:
    for series, text in zip(forced("dense"), texts(), strict=True):
        assert series.places == len(text.output)
        assert all(count == BLOCK for count in series.count[:-1])


def blocks(values: Sequence[Sequence[float]], size: int = 4) -> Blocks:
    """Texts as places; cut into blocks."""
    counts = [[len(text[at : at + size]) for at in range(0, len(text), size)] for text in values]
    sums = [{"kl": [sum(text[at : at + size]) for at in range(0, len(text), size)]} for text in values]
    return Blocks.of(counts, sums, size)


def test_the_mean_is_over_places_and_equal_ones_leave_no_doubt() -> None:
    assert estimate(blocks([[1.0] * 6, [2.0] * 2]), "kl").value == pytest.approx(10 / 8)
    sure = estimate(blocks([[3.0] * 9, [3.0] * 5]), "kl")
    assert (sure.low, sure.value, sure.high) == (3, 3, 3)
    with pytest.raises(ValueError, match="no places"):
        estimate(Blocks(np.zeros((1, 1)), {"kl": np.zeros((1, 1))}, 4), "kl")


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    """Texts differ, and so do places within them: the mean is covered in at least 85 % of trials."""
    rng, covered, trials = np.random.default_rng(1), 0, 60
    for trial in range(trials):
        drawn = [list(rng.normal(1 + shift, 1, size=80)) for shift in rng.normal(0, 0.3, size=20)]
        found = estimate(blocks(drawn, 16), "kl", seed=trial)
        covered += found.low <= 1 <= found.high
    assert 0.85 * trials <= covered


def test_a_curve_goes_by_place_over_the_texts_that_reach_there() -> None:
    found = curve(blocks([[0.0] * 8 + [1.0] * 8, [0.0] * 8]), "kl", points=2)
    assert [(start, stop, there.value) for start, stop, there in found] == [(0, 8, 0), (8, 16, 1)]


def test_perplexity_rises_with_the_loss() -> None:
    assert estimate(blocks([[1.0, 2.0]]), "kl").mapped(math.exp).value == pytest.approx(math.exp(1.5))
