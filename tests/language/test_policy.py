"""Policies: what their texts say, how they inherit, what overrides change, and that they come back from YAML."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from pathlib import Path

import pytest

from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import Policy, Quantity, Range, load_policy, loads_policy, shipped_policies

VALID = Path(__file__).parent / "valid"
TEXTS = sorted(VALID.glob("*.yaml"))


def quantity(text: str) -> Quantity:
    return Quantity.parse(text)


# The two policies of the design ----------------------------------------------------------------------------------


def test_raas_keeps_the_prompt_and_ranks_pages():
    policy = load_policy(VALID / "raas.yaml")
    assert (policy.kvpolicy, policy.name, policy.cite) == (1, "raas", ("arXiv:2502.11147",))
    assert {name: param.value.constant for name, param in policy.params.items()} == {
        "budget": 1024,
        "page_size": 16,
        "touch": Fraction(1, 2),
    }
    prompt, generated = policy.pools.values()
    assert list(policy.pools) == ["prompt", "generated"]
    assert (prompt.admit.kind, prompt.budget, prompt.page.constant) == ("prompt", None, 16)
    assert prompt.admits == {"prompt"} and generated.admits == {"generated"}
    assert generated.budget == quantity("max(32, 1024 - size(prompt))")
    assert generated.budget.names == {"size(prompt)"}
    scorer = generated.scorer
    assert (scorer.signal.name, scorer.heads, scorer.queries.kind, scorer.over) == (
        "page-bound",
        "max",
        "current",
        "cache",
    )
    assert (scorer.hit.kind, scorer.hit.value.constant, scorer.memory.kind) == ("top", Fraction(1, 2), "last-hit")
    assert (generated.update.kind, generated.update.every.constant, generated.evict.scope) == ("every", 1, "kv-head")
    assert policy.source.endswith("raas.yaml") and policy.bind(budget=64).source == policy.source
    (test,) = policy.tests
    assert test.set == {"budget": 64, "page_size": 4}
    assert test.attention == {"pattern": "milestone", "prompt": 16, "steps": 160, "at": 40, "until": 90}
    assert test.expect[1] == {"keeps": 40, "until": 90} and test.expect[3] == {"resident": {"max": 64}}


def test_scope_budget_and_cadence_follow_the_horizon():
    policy = load_policy(VALID / "scope-discontinuous.yaml")
    prompt, generated = policy.pools.values()
    assert (prompt.update.kind, prompt.scorer.queries.kind, prompt.scorer.memory.kind) == ("prompt-end", "all", "sum")
    assert generated.update.kind == "every" and generated.update.every.names == {"max_new_tokens"}
    assert generated.update.every.fold({"max_new_tokens": 4096}).constant == 15
    budget = generated.budget.fold({"max_new_tokens": 4096})
    assert [budget.evaluate({"t": t}) for t in (1, 256, 271, 4096)] == [256, 256, 257, 512]
    assert budget.direction() == "up" and budget.bound({"t": Range(0, math.inf)}) == Range(256, 512)
    shorter = policy.bind(horizon=512, beta1=16)
    assert shorter.pools["generated"].update.every.constant == 16


# Every spelling --------------------------------------------------------------------------------------------------


def test_every_spelling():
    policy = load_policy(VALID / "everything.yaml")
    pools = policy.pools
    assert [pool.admit.kind for pool in pools.values() if pool.admit] == ["special", "modality", "prompt", "generated"]
    assert pools["images"].admit.modality == "image" and pools["images"].admits == {"image"}
    assert pools["cold"].admit is None and pools["cold"].admits == frozenset()
    assert pools["images"].scorer.signal.args == {"above": quantity("0.6"), "keep": "newest"}
    assert [(pin.kind, pin.count) for pin in pools["prompt"].pinned] == [
        ("first", quantity("4")),
        ("special", None),
        ("survivors", None),
    ]
    scorer = pools["prompt"].scorer
    assert (scorer.queries.kind, scorer.queries.last.constant, scorer.heads) == ("last", 8, "logits-max")
    assert (scorer.smooth.kind, scorer.smooth.width.constant, scorer.norm) == ("max", 7, "softmax")
    assert (scorer.memory.kind, scorer.memory.value.constant) == ("max-decay", Fraction(4, 5))
    assert (pools["prompt"].evict.scope, pools["prompt"].evict.floor.constant) == ("across-heads", Fraction(1, 5))
    assert pools["prompt"].read.scorer.heads == "sum" and pools["prompt"].store.bits.constant == 8
    assert pools["generated"].read is None and pools["generated"].store is None
    first, second = pools["generated"].scorer.sum
    assert first.weight.constant == Fraction(1, 10) and first.hit.value.constant == Fraction(1, 8)
    assert [part.signal.name for part in second.product] == ["random", "value-norm"]
    assert second.product[0].signal.args == {"seed": quantity("3")}
    assert pools["images"].evict.to == "cold"
    assert (policy.total.constant, policy.positions, policy.prompt_chunk.constant) == (64 * 1024, "compact", 512)
    assert policy.params["kept"].value.constant == 4096 and policy.params["kept"].default == quantity("2 * base")
    assert " ".join(policy.summary.split()) == "All keys of the language, none of them useful together."


def test_only_built_in_names_are_free():
    free: set[str] = set()
    for pool in load_policy(VALID / "everything.yaml").pools.values():
        free |= pool.budget.names if pool.budget else set()
    assert free == {"prompt_len", "layer", "layers", "size(prompt)", "seen(images)"}


# Overrides -------------------------------------------------------------------------------------------------------


def test_overrides_by_layer_and_head():
    policy = load_policy(VALID / "everything.yaml")
    assert policy.pools_for(0, 12) is None and policy.pools_for(1, 12) is None
    assert policy.pools_for(2, 12) == policy.pools
    assert policy.pools_for(11, 12)["generated"].window.constant == 3
    assert policy.pools_for(11, 12)["generated"].page.constant == 1
    assert policy.pools_for(5, 12)["cold"].budget.constant == 16
    assert policy.pools_for(3, 12) == policy.pools_for(3, 12, 1) == policy.pools
    special = policy.pools_for(3, 12, 0)["generated"]
    assert (
        special.budget.constant == 8 and special.scorer is None and special.pinned == policy.pools["generated"].pinned
    )
    assert policy.pools_for(10, 12, 1)["generated"].budget.constant == 8


def test_an_override_of_layers_that_are_not_there():
    text = "kvpolicy: 1\nname: x\npools: {all: {admit: all}}\noverrides: [{layers: 4, dense: true}]\n"
    policy = loads_policy(text)
    assert policy.pools_for(4, 5) is None
    with pytest.raises(PolicyError, match=r"layer 4, but the model has layers 0\.\.3"):
        policy.pools_for(0, 4)


def test_later_overrides_go_over_earlier_ones():
    policy = loads_policy(
        """
kvpolicy: 1
name: x
pools:
  all: {admit: all, budget: 64}
overrides:
  - {layers: 0..3, pools: {all: {window: 8}}}
  - {layers: 2, dense: true}
  - {layers: [1, 2], pools: {all: {budget: 32}}}
"""
    )
    budgets = {layer: policy.pools_for(layer, 4)["all"] for layer in range(4)}
    assert [pool.budget.constant for pool in budgets.values()] == [64, 32, 32, 64]
    assert [pool.window and pool.window.constant for pool in budgets.values()] == [8, 8, None, 8]


# Inheritance -----------------------------------------------------------------------------------------------------

PARENT = """
kvpolicy: 1
name: parent
summary: not inherited
cite: [not inherited]
params:
  kept: {default: 64, help: tokens kept}
  newest: {default: 8, help: newest tokens}
let: {twice: 2 * kept}
pools:
  prompt: {admit: prompt, budget: twice, window: newest, scorer: {signal: attention, memory: sum}}
  generated: {admit: generated, budget: kept}
positions: compact
tests: [{name: not inherited, attention: {pattern: sink}, expect: [{keeps: 1}]}]
"""


def child(folder: Path, text: str) -> Policy:
    (folder / "parent.yaml").write_text(PARENT)
    (folder / "child.yaml").write_text("kvpolicy: 1\nname: child\nextends: ./parent.yaml\n" + text)
    return load_policy(folder / "child.yaml")


def test_a_child_merges_by_key_and_replaces_below(tmp_path):
    policy = child(
        tmp_path,
        """
params: {kept: {default: 128, help: more}}
let: {twice: 3 * kept}
pools:
  prompt: {window: null, scorer: {signal: recency}, pinned: {first: newest}}
  generated: {evict: {to: extra}}
  extra: {budget: 16}
""",
    )
    assert (policy.name, policy.summary, policy.cite, policy.tests) == ("child", "", (), ())
    assert policy.extends == "./parent.yaml" and policy.positions == "compact"
    prompt = policy.pools["prompt"]
    assert prompt.budget.constant == 384 and prompt.window is None and prompt.pinned[0].count.constant == 8
    assert prompt.scorer.signal.name == "recency" and prompt.scorer.memory.kind == "none"
    assert list(policy.pools) == ["prompt", "generated", "extra"]
    assert policy.pools["generated"].budget.constant == 128


def test_null_deletes_pools_params_and_keys(tmp_path):
    policy = child(
        tmp_path,
        """
params: {newest: null}
let: {twice: null}
pools: {prompt: {budget: kept, window: null}, generated: null, rest: {admit: generated}}
positions: null
""",
    )
    assert list(policy.params) == ["kept"] and list(policy.pools) == ["prompt", "rest"]
    assert policy.positions == "absolute" and policy.let == {}


def test_a_shipped_parent_by_name():
    policy = loads_policy("kvpolicy: 1\nname: mine\nextends: raas\npools: {generated: {window: 32}}\n")
    assert policy.pools["generated"].window.constant == 32 and "budget" in policy.params
    assert loads_policy(policy.to_yaml()) == policy and "extends" not in policy.to_yaml()


def test_a_parent_of_a_parent_is_found_beside_its_child(tmp_path):
    (tmp_path / "deep").mkdir()
    child(tmp_path, "")
    (tmp_path / "deep" / "grandchild.yaml").write_text("kvpolicy: 1\nname: g\nextends: ../child.yaml\n")
    assert load_policy(tmp_path / "deep" / "grandchild.yaml").pools == child(tmp_path, "").pools


# Values ----------------------------------------------------------------------------------------------------------


def test_values_are_set_as_texts_numbers_or_expressions():
    raas = load_policy("raas", {"budget": "2k", "page_size": 8})
    assert raas.params["budget"].value.constant == 2048 and raas.params["budget"].default.constant == 1024
    assert raas == load_policy("raas").bind(budget=2048, page_size="2 * 4").bind(budget="2k", page_size=8)
    assert raas.bind(budget="64 * page_size").params["budget"].value.constant == 512
    with pytest.raises(PolicyError, match="--set budgt=3"):
        raas.bind(budgt=3)
    with pytest.raises(UsageError, match="without a text"):
        Policy(kvpolicy=1, name="x", pools={}).bind(a=1)


@pytest.mark.parametrize("path", [*TEXTS, *shipped_policies().values()], ids=lambda path: path.stem)
def test_a_policy_comes_back_from_its_yaml(path):
    policy = load_policy(path)
    again = loads_policy(policy.to_yaml())
    assert again == policy and again.digest == policy.digest and hash(again) == hash(policy)
    assert loads_policy(again.to_yaml()).to_yaml() == again.to_yaml()
    for twin in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert twin == policy and twin.to_yaml() == policy.to_yaml()
    name = next(iter(policy.params), None)
    if name is not None:
        bound = policy.bind(**{name: policy.params[name].value.text})
        assert loads_policy(bound.to_yaml()) == bound and bound.digest == policy.digest


def test_the_digest_tells_what_a_policy_does():
    text = (VALID / "raas.yaml").read_text()
    policy = loads_policy(text)
    assert len(policy.digest) == 12
    assert policy.digest == loads_policy(text.replace("name: raas", "name: other").replace("1024", "1k")).digest
    assert policy.digest != policy.bind(budget=512).digest
    assert policy.digest == policy.bind(budget=512).bind(budget=1024).digest
    assert policy != policy.bind(budget=512) and policy != "raas"
    layered = text + "overrides: [{layers: 0, pools: {generated: {page: 16}}}]\n"
    assert loads_policy(layered).digest != policy.digest


def test_a_policy_never_changes():
    policy = load_policy("raas")
    with pytest.raises(ValueError, match="frozen"):
        policy.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        policy.pools["prompt"].budget = quantity("3")
