"""Other defaults in a policy's text: what it does changes as asked, comments stay, its tests mean what they meant."""

from pathlib import Path

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language import Policy, load_policy, loads_policy, shipped_policies
from kvpolicy.language.library import fetch
from kvpolicy.language.rewriting import rewritten
from kvpolicy.language.uses import numbers

TEXT = """\
# Why it is so.
kvpolicy: 1
name: mine   # a name
params:
  budget: {default: 64, help: tokens kept}   # of all
  window:
    help: newest tokens
    default: 8
pools:
  all: {admit: all, budget: budget, window: window}
tests:
  - name: one
    attention: {pattern: sink, steps: 80}
    expect: [{resident: {max: 64}}]
  - {name: two, set: {window: 4}, attention: {pattern: sink, steps: 80}, expect: [{resident: {max: 64}}]}
  - name: three
    set:
      window: 4
    attention: {pattern: sink, steps: 80}
    expect: [{resident: {max: 64}}]
"""


def other(policy: Policy) -> dict[str, str]:
    """Other values of as many params as take one of a few, together."""
    found: dict[str, str] = {}
    for name in policy.params:
        for value in ("3", "8", "30%"):
            try:
                policy.bind(**{**found, name: value})
            except PolicyError:
                continue
            found[name] = value
            break
    return found


def test_comments_and_layout_stay() -> None:
    text = rewritten(TEXT, "mine.yaml", name="yours", defaults={"budget": "32", "window": "8"})
    changed = [(a, b) for a, b in zip(TEXT.splitlines(), text.splitlines(), strict=False) if a != b]
    assert changed[:2] == [
        ("name: mine   # a name", "name: yours   # a name"),
        (
            "  budget: {default: 64, help: tokens kept}   # of all",
            "  budget: {default: 32, help: tokens kept}   # of all",
        ),
    ]
    assert text.startswith("# Why it is so.\n")


def test_tests_are_told_what_they_counted_on() -> None:
    policy = loads_policy(rewritten(TEXT, "mine.yaml", name="yours", defaults={"budget": "32", "window": "6"}))
    assert [dict(test.set) for test in policy.tests] == [
        {"budget": 64, "window": 8},
        {"budget": 64, "window": 4},
        {"budget": 64, "window": 4},
    ]


@pytest.mark.parametrize("name", shipped_policies())
def test_it_does_what_binding_does(name: str) -> None:
    text, filename = fetch(name)
    policy = load_policy(name)
    values = other(policy)
    found = loads_policy(rewritten(text, filename, name="other", defaults=values), filename)
    assert found.digest == policy.bind(**values).digest
    assert (found.name, found.extends) == ("other", None)
    assert len(found.tests) == len(policy.tests)
    assert {name: param.default.text for name, param in found.params.items()} == {
        name: values.get(name, param.default.text) for name, param in policy.params.items()
    }


def test_a_child_is_written_out_whole(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("# Mine.\nkvpolicy: 1\nextends: h2o\nname: child\nparams: {heavy: {default: 9, help: more}}\n")
    text = rewritten(child.read_text(), str(child), name="grown", defaults={"recent": "5"})
    assert text.startswith("# Mine.\n") and "extends" not in text
    assert loads_policy(text).digest == load_policy(str(child)).bind(recent=5).digest


def test_values_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PolicyError, match="larger than the budget"):
        rewritten(TEXT, "mine.yaml", name="yours", defaults={"window": "99"})


def test_every_number_has_the_unit_of_its_place() -> None:
    units = {
        ".".join(map(str, where)): (role.unit, quantity.text) for where, role, quantity in numbers(loads_policy(TEXT))
    }
    assert units["pools.all.budget"] == ("tokens", "64")
    assert units["pools.all.window"] == ("tokens", "8")
    assert units["pools.all.update.every"] == ("count", "1")
    keyformer = {where[-1]: role for where, role, _ in numbers(load_policy("keyformer"))}
    assert (keyformer["temperature"].unit, float(keyformer["temperature"].least or 0)) == ("number", 0.01)
