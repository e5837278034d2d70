"""What lies on each rank, and how processes of a launch keep together: without a launch."""

import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from kvpolicy.architecture import Architecture
from kvpolicy.cli.main import main
from kvpolicy.errors import KvpolicyError, ModelError, PolicyError, UsageError
from kvpolicy.language import load_policy, loads_policy
from kvpolicy.models import processes as module
from kvpolicy.models.processes import Processes, processes
from kvpolicy.patching import applied, patch_of
from kvpolicy.patching.parallel import _shares_heads
from kvpolicy.plan import ModelGeometry, gathered, make_plan, on_rank
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.fused import Fusion
from kvpolicy.runtime.ranks import Ranks
from tests.ranks.following import model

SHAPE = ModelGeometry("random", layers=2, query_heads=16, kv_heads=8, head_dim=4)


def plan_of(name, **params):
    return make_plan(load_policy(name, set=params), SHAPE, batch=2, prompt=40, max_new_tokens=20)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["raas", "tova", "h2o", "random-unpinned", "duo-attention", "kivi", "quest"])
def test_ranks_hold_all_heads_between_them_and_each_its_part_of_the_bytes(name, ranks):
    plan = plan_of(name, **({"budget": 80} if name in ("raas", "quest", "tova") else {}))
    parts = [on_rank(plan, rank, ranks) for rank in range(ranks)]
    clocks = sum(buffer.bytes for buffer in plan.clocks)  # each rank has its own
    window = sum(
        math.prod(buffer.shape) * 4
        for layer in plan.layers
        for buffer in layer.buffers
        if "query_position" in buffer.name
    )
    assert sum(part.bytes for part in parts) == plan.bytes + (ranks - 1) * (clocks + window)
    for number, layer in enumerate(plan.layers):
        here = [layer.groups or (layer,) for layer in (part.layers[number] for part in parts)]
        assert sorted(head for groups in here for group in groups for head in group.members) == list(range(8))
    for part in parts:
        cache = PolicyCache(plan, ranks=Ranks(parts.index(part), ranks, "none"))
        assert cache.bytes == cache.own.bytes == part.bytes


def test_heads_that_compete_may_all_win_on_one_rank():
    floor = {"budget": 10, "window": 2, "safeguard": "20%"}
    whole, part = plan_of("ada-kv", **floor), on_rank(plan_of("ada-kv", **floor), 1, 4)
    pools = [plan.layers[0].pools[0] for plan in (whole, part)]
    assert pools[0].capacity == 8 * 10 + 4  # half a unit a head for rounding
    assert pools[1].capacity == math.floor(0.8 * 8 * 10 + 0.2 * 2 * 10 + 2 / 2)
    shared = on_rank(plan_of("ada-kv", **{**floor, "safeguard": 1}), 1, 4).layers[0].pools[0]
    assert shared.capacity == 2 * 10  # nothing to win


def test_one_rank_is_the_plan_itself_and_uneven_ones_are_refused():
    plan = plan_of("tova", budget=12)
    assert on_rank(plan, 0, 1) is plan
    with pytest.raises(
        UsageError, match="3 ranks cannot share the 8 KV heads of this random model evenly; start 2 or 4"
    ):
        on_rank(plan, 0, 3)


def test_scores_that_ranks_put_together_are_counted():
    assert gathered(plan_of("h2o")) == (0, 0)
    step, prompt = gathered(plan_of("tova", budget=12))
    assert step == 2 * 2 * 8 * 13 * 4  # layers, rows, heads, slots, float32
    assert prompt == 2 * 2 * 8 * 40 * 4
    assert gathered(plan_of("ada-kv", budget=12, window=2)) == (0, 2 * 2 * 8 * 41 * 8)


def test_explain_says_what_each_rank_holds(capsys):
    assert main(["explain", "tova", "--shape", "llama-3.1-8b", "--ranks", "4"]) == 0
    assert "Each of 4 ranks holds 32.5 MiB; they gather 1.0 MiB at each update" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["explain", "h2o", "--ranks", "2"]) == 2
    assert "2 ranks cannot share the 3 KV heads" in capsys.readouterr().err


def test_numbers_drawn_for_heads_of_another_rank_are_not_drawn_by_the_kernels():
    """They count heads from 0, and a number is drawn by the head's number in the model."""
    plan = make_plan(load_policy("random-unpinned"), SHAPE, prompt=40, max_new_tokens=20)
    for rank, fits in ((0, True), (1, False)):
        part = on_rank(plan, rank, 2)
        assert isinstance(Fusion.of(part.layers[0], part.geometry), Fusion) == fits
    text = "kvpolicy: 1\nname: one\npools: {all: {admit: all, budget: 9, scorer: {signal: random}}}\n"
    heads = loads_policy(f"{text}overrides: [{{heads: [[0, 1]], pools: {{all: {{budget: 5}}}}}}]", filename="one")
    groups = make_plan(heads, SHAPE, prompt=40, max_new_tokens=20).layers[0].groups
    assert [isinstance(Fusion.of(group, SHAPE.of_heads(len(group.members))), Fusion) for group in groups] == [
        False,
        False,
    ]


def test_processes_are_those_of_a_launcher(monkeypatch):
    for name in module.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert processes() == Processes(0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some clusters set it for a machine
    assert processes() == Processes(0, 1, 0)
    for name, value in zip(module.VARIABLES, ("5", "8", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes() == Processes(rank=5, count=8, local=1)
    assert not processes().first


class Fellows(Processes):
    """Processes played by threads."""

    def collect(self, value):
        said[self.rank] = value
        meeting.wait(timeout=20)
        return [said[rank] for rank in range(self.count)]


said: dict = {}
meeting = threading.Barrier(2)


def both(work):
    """What each of two processes makes of it, or what it raises."""

    def attempt(rank):
        try:
            return work(Fellows(rank, 2))
        except KvpolicyError as fault:
            return fault

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(attempt, range(2)))


def test_a_sweep_gives_each_process_its_share_and_all_the_results():
    done = []
    found = both(lambda here: here.spread(list("abcde"), lambda item: done.append((here.rank, item)) or item.upper()))
    assert found == [list("ABCDE")] * 2
    assert sorted(done) == [(0, "a"), (0, "c"), (0, "e"), (1, "b"), (1, "d")]


def test_an_error_of_one_process_is_raised_in_all():
    def work(item):
        if item == "b":
            raise PolicyError("b makes no sense")
        return item

    assert [str(fault) for fault in both(lambda here: here.spread(list("abc"), work))] == ["b makes no sense"] * 2
    assert [str(fault) for fault in both(lambda here: here.told(lambda: work("b")))] == ["b makes no sense"] * 2
    assert str(pickle.loads(pickle.dumps(PolicyError("it is so")))) == "it is so"  # as it travels


def test_what_one_process_is_told_all_are():
    assert both(lambda here: here.told(lambda: here.rank)) == [0, 0]
    assert both(lambda here: here.any(here.rank == 1)) == [True, True]


def test_only_the_first_process_does_what_is_not_shared_out(monkeypatch, capsys):
    for name, value in zip(module.VARIABLES, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert main(["list", "policies"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["apply", "no-such-policy"]) != 0  # and an error that all meet is said by the first
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["apply", "no-such-policy"]) != 0
    assert capsys.readouterr().err.count("no-such-policy") == 1


def test_a_cache_of_other_heads_is_told_from_the_models():
    small, policy = model(), load_policy("tova", set={"budget": 8})
    with applied(small, policy), torch.no_grad():
        plan = make_plan(policy, patch_of(small).geometry, prompt=5, max_new_tokens=4)
        with pytest.raises(ModelError, match="was given 4 KV heads, and the cache was made for 2"):
            small(torch.ones(1, 5, dtype=torch.long), past_key_values=PolicyCache(plan, ranks=Ranks(0, 2, "none")))


@pytest.mark.parametrize(
    ("styles", "shared"),
    [
        ({"q_proj": "colwise", "k_proj": "colwise"}, True),
        ({"q_proj": "colwise_gather_output", "k_proj": "colwise_gather_output"}, False),
        ({"qkv_proj": "colwise_rep"}, False),
        ({}, False),
    ],
)
def test_whose_heads_are_shared_out_is_read_off_the_plan(styles, shared):
    plan = {f"model.layers.*.self_attn.{name}": style for name, style in styles.items()}
    assert _shares_heads(SimpleNamespace(_tp_plan=plan), Architecture(("some",), "")) is shared


def test_queries_that_are_shared_out_without_their_keys_are_refused():
    plan = {"model.layers.*.self_attn.q_b_proj": "colwise", "model.layers.*.mlp.up_proj": "colwise"}
    latent = SimpleNamespace(_tp_plan=plan, config=SimpleNamespace(model_type="latent"))
    with pytest.raises(ModelError, match="shares out q_b_proj of this latent model but not its keys"):
        _shares_heads(latent, Architecture(("latent",), ""))
