"""Every shipped policy as a document: complete, explained, and the same however it travels."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from kvpolicy.language import Policy, load_policy, loads_policy, shipped_policies
from kvpolicy.plan import ModelGeometry, make_plan, unsupported
from tests.policies.kit import FILES

POLICIES = {name: load_policy(path) for name, path in FILES.items()}
OTHER = {"touch": "25%", "safeguard": "25%", "share": "25%", "kernel": 9, "fade": "25%", "bits": 4}
"""Values to set params to, where 300 makes no sense."""

LLAMA = ModelGeometry("llama", layers=32, query_heads=32, kv_heads=8, head_dim=128)


def header(name: str) -> str:
    """The comment that a file begins with."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])


def test_the_shipped_ones_are_the_files() -> None:
    assert set(FILES) == set(shipped_policies())


@pytest.mark.parametrize("name", FILES)
def test_it_says_who_it_is(name: str) -> None:
    policy = load_policy(name)
    assert policy == POLICIES[name] and policy.name == name
    assert policy.summary.endswith(".") and len(policy.summary) <= 110
    assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper) for paper in policy.cite)
    assert policy.tests


@pytest.mark.parametrize("name", FILES)
def test_it_names_its_paper_and_its_departures_or_what_it_is_compared_with(name: str) -> None:
    """A method says where it departs from its paper (or that another file does); a baseline that it is one."""
    a_method = bool(POLICIES[name].cite) and not name.startswith("random")
    assert re.search(r"[Dd]epart" if a_method else r"baseline|control|compared|difference", header(name))


@pytest.mark.parametrize("name", FILES)
def test_each_param_is_explained_and_can_be_set(name: str) -> None:
    policy = POLICIES[name]
    for param, meaning in policy.params.items():
        assert len(meaning.help.split()) >= 2
        other = policy.bind(**{param: OTHER.get(param, 300)})
        assert other.params[param].value.constant in (300, 0.25, 9, 4)
        assert other.digest != policy.digest, f"{param} changes nothing"


@pytest.mark.parametrize("name", FILES)
def test_it_survives_being_written_out(name: str) -> None:
    policy = POLICIES[name]
    again = loads_policy(policy.to_yaml())
    assert again == policy and again.digest == policy.digest and again.tests == policy.tests
    small = policy.bind(**{param: OTHER.get(param, 300) for param in policy.params})
    assert loads_policy(small.to_yaml()) == small


@pytest.mark.parametrize("name", FILES)
def test_its_digest_is_what_it_does_and_not_what_it_is_called(name: str) -> None:
    text = re.sub(r"(?m)^(name|summary): .*$", r"\1: other", POLICIES[name].to_yaml())
    renamed = loads_policy(text)
    assert renamed.name == "other" and renamed.digest == POLICIES[name].digest


def test_digests_differ_and_are_the_same_in_every_process() -> None:
    digests = {name: policy.digest for name, policy in POLICIES.items()}
    assert len(set(digests.values())) == len(digests)
    code = "from kvpolicy import load_policy; import sys\nfor name in sys.argv[1:]: print(load_policy(name).digest)"
    said = subprocess.run(
        [sys.executable, "-c", code, *digests], env={"PYTHONHASHSEED": "1"}, cwd=FILES["raas"].parents[1],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.split() == list(digests.values())


@pytest.mark.parametrize("name", FILES)
def test_the_runtime_can_run_it_at_its_defaults(name: str) -> None:
    """A prompt of 900 tokens fits into every budget that a policy is held to; a long one shows that the others drop."""
    longest = 16384 if POLICIES[name].total is None else 900
    plan = make_plan(POLICIES[name], LLAMA, prompt=(100, longest), max_new_tokens=4096)
    assert not list(unsupported(plan))
    for pools in (pools for layer in plan.layers for pools in layer.heads or (layer.pools,)):
        drops = any(pool.evicts and pool.to is None for pool in pools)
        if not any(pool.pin_special for pool in pools):  # all of a prompt may be special
            assert (sum(pool.bound for pool in pools) < longest + 4096) == drops


def answers(policy: Policy) -> dict[tuple[str, str], str]:
    """(pool, key) -> the answer, as text."""
    told = {name: pool.model_dump(mode="json", exclude_defaults=True) for name, pool in policy.pools.items()}
    return {(name, key): str(value) for name, pool in told.items() for key, value in pool.items()}


@pytest.mark.parametrize(
    ("child", "parent", "differs"),
    [("scope-adaptive", "scope-discontinuous", "update"), ("scope-slide", "scope-adaptive", "budget")],
)
def test_the_scope_family_differs_by_one_answer_at_a_time(child: str, parent: str, differs: str) -> None:
    assert POLICIES[child].extends == parent
    one, other = answers(POLICIES[child]), answers(POLICIES[parent])
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == {("generated", differs)}


def test_raas_refuses_a_prompt_that_leaves_no_room() -> None:
    raas = load_policy("raas", set={"budget": 64})
    assert make_plan(raas, LLAMA, prompt=32, max_new_tokens=100).resident_bound == 64
    with pytest.raises(ValueError, match="raise the budget to 80 or more, or shorten the prompt"):
        make_plan(raas, LLAMA, prompt=33, max_new_tokens=100)
