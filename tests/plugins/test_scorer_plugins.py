"""A signal of another package: known to the language like a built-in one, run by oracle and runtime alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy.cli.main import main
from kvpolicy.errors import PolicyError, UsageError
from kvpolicy.language import loads_policy
from kvpolicy.language.schema import json_schema
from kvpolicy.testing.agreement import Disagreement
from kvpolicy.testing.scorers import check_scorer, settings
from tests.plugins.conftest import Install

ROOT = Path(__file__).parents[2]

# Two signals: the p-norm of a key, which looks at no query, and attention to the power of p, which does.
DEFINED = """\
    import numpy as np
    from kvpolicy import SignalArgument, SignalDefinition

    def key_power(view, leaf, over, ranked):
        p = float(dict(leaf.args)["power"])
        return (np.abs(view.keys()) ** p).sum(-1) ** (1 / p)

    def sharp(view, leaf, over, ranked):
        logits = np.where(over, view.logits(view.asked(leaf.queries)), -np.inf)
        if leaf.heads == "logits-max":
            logits = logits.max(axis=0, keepdims=True)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    KEY_POWER = SignalDefinition(
        "the p-norm of the key",
        arguments={"power": SignalArgument("p, at least 1", 3), "of": SignalArgument("what", "keys", ("keys",))},
        needs={"keys"}, numpy=key_power, torch="powers.on_torch:key_power",
    )
    SHARP = SignalDefinition(
        "attention, once more", queries=True, softmax=True, needs={"logits"}, numpy="powers:sharp",
        torch="powers.on_torch:sharp",
    )
    """
ON_TORCH = """\
    def key_power(sight, pool, leaf):
        keys, p = sight.unit_keys(pool), leaf.args["power"]
        return sight.state.page_max(pool, keys.norm(p=p, dim=-1))

    def sharp(sight, pool, leaf):
        return sight.state.page_max(pool, sight.attention(pool, leaf))
    """
FILES = {"powers/__init__.py": DEFINED, "powers/on_torch.py": ON_TORCH}
ENTRIES = {"key-power": "powers:KEY_POWER", "sharp": "powers:SHARP"}

POLICY = """\
kvpolicy: 1
name: power
params: {p: {default: 2, help: power}}
pools:
  all: {admit: all, budget: 8, scorer: {signal: {key-power: {power: p}}}}
tests:
  - name: some leave
    attention: {pattern: uniform, noise: 1, prompt: 12, steps: 8}
    expect: [{resident: {is: 8}}]
"""


def using(signal: str) -> str:
    return f"kvpolicy: 1\nname: x\npools: {{all: {{admit: all, budget: 9, scorer: {{signal: {signal}}}}}}}\n"


def spoilt(of: str, to: str) -> dict[str, str]:
    """The package with something wrong."""
    assert of in DEFINED + ON_TORCH
    return {path: text.replace(of, to) for path, text in FILES.items()}


def test_its_arguments_are_read_like_those_of_a_built_in_signal(install: Install) -> None:
    install("powers", FILES, ENTRIES)
    args = loads_policy(POLICY).pools["all"].scorer.signal.args  # type: ignore[union-attr]
    assert args["power"].constant == 2 and args["of"] == "keys"
    assert loads_policy(using("key-power")).pools["all"].scorer.signal.args["power"].constant == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("signal", "says"),
    [
        ("{key-power: {powr: 2}}", "did you mean `power`?"),
        ("{key-power: {of: values}}", "`of` is keys, not `values`"),
        ("{key-power: {power: t}}", "must be known when the plan is made"),
        ("key-powr", "did you mean `key-power`?"),
        ("key-power, heads: max", "`key-power` looks at no query"),
        ("key-power, over: pool", "is no softmax"),
    ],
)
def test_mistakes_are_told_with_their_place(install: Install, signal: str, says: str) -> None:
    install("powers", FILES, ENTRIES)
    with pytest.raises(PolicyError) as error:
        loads_policy(using(signal), "mine.yaml")
    (mistake,) = error.value.diagnostics
    assert mistake.line == 3 and says in f"{mistake.reason} {mistake.hint}"


def test_the_schema_knows_it(install: Install) -> None:
    install("powers", FILES, ENTRIES)
    named = json_schema()["$defs"]["Signal"]["anyOf"]
    assert {"const": "key-power", "description": "the p-norm of the key"} in named
    (form,) = [item for item in named if "key-power" in item.get("properties", ())]
    assert form["properties"]["key-power"]["properties"]["power"]["default"] == "3"


def test_it_is_listed_with_its_package(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("powers", FILES, {**ENTRIES, "lost": "powers:LOST"})
    assert main(["list", "signals", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["signals"]}
    assert listed["key-power"] == {
        "name": "key-power", "summary": "the p-norm of the key", "from": "the package powers 1.2",
    }  # fmt: skip
    assert listed["lost"]["summary"].startswith("BROKEN: the signal `lost` of the package powers 1.2 cannot be loaded")


def test_validate_explain_and_test_import_no_torch(install: Install, tmp_path: Path) -> None:
    site = install("powers", FILES, ENTRIES)
    (tmp_path / "power.yaml").write_text(POLICY)
    code = (
        f"import sys\nsys.path.insert(0, {str(site)!r})\n"
        "from kvpolicy.cli.main import main\n"
        f"codes = [main([verb, {str(tmp_path / 'power.yaml')!r}]) for verb in ('validate', 'explain', 'test')]\n"
        "loaded = {'torch', 'transformers', 'powers.on_torch'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {loaded}' if loaded or any(codes) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "key-power with of keys, power 2 (the p-norm of the key)" in " ".join(done.stdout.split())


def test_its_recipes_agree_under_every_setting(install: Install) -> None:
    install("powers", FILES, ENTRIES)
    assert check_scorer("key-power", power=2) > 0
    assert len(settings("sharp")) > len(settings("key-power"))
    assert check_scorer("sharp") > 0


def test_the_test_verb_runs_it_on_the_runtime(install: Install, tmp_path: Path) -> None:
    install("powers", FILES, ENTRIES)
    path = tmp_path / "power.yaml"
    path.write_text(POLICY)
    assert main(["test", str(path), "--runtime"]) == 0


def test_recipes_that_part_are_told_at_the_first_difference(install: Install) -> None:
    install("powers", spoilt("keys.norm(p=p, dim=-1)", "keys.norm(p=1, dim=-1)"), ENTRIES)
    with pytest.raises(Disagreement, match=r"key-power, as it is, one pool, random text: .*KV head 0, pool all, t "):
        check_scorer("key-power")


def test_compiled_it_keeps_the_same_and_a_plugin_found_later_costs_no_second_graph(install: Install) -> None:
    from kvpolicy.testing.feeding import RuntimeBeside, passes, plan_for
    from kvpolicy.testing.patterns import synthesize

    install("powers", FILES, ENTRIES)
    said = synthesize({"pattern": "uniform", "noise": 1, "prompt": 12, "steps": 8})
    feed = RuntimeBeside(plan_for(loads_policy(POLICY), said), compiled=True)
    moments = list(passes(said, None))
    for now in moments[:4]:
        feed.feed(said, now)
    RuntimeBeside(plan_for(loads_policy(using("sharp")), said))  # loads another signal
    for now in moments[4:]:
        feed.feed(said, now)
    assert feed.beside.cache.stats()["evicted"] > 0


@pytest.mark.parametrize(
    ("files", "entries", "says"),
    [
        ({}, {"key-power": "powers:KEY_POWER"}, "cannot be loaded from powers:KEY_POWER: ModuleNotFoundError"),
        (FILES, {"key-power": "powers:POWER_KEY"}, "AttributeError"),
        (FILES, {"key-power": "powers:key_power"}, "must be a kvpolicy.SignalDefinition, not a function"),
        (spoilt('needs={"keys"}', 'needs={"kyes"}'), ENTRIES, "needs 'kyes'; known are logits"),
        (spoilt('needs={"keys"}', 'needs={"drawn"}'), ENTRIES, "which is for `random` alone"),
        (spoilt('"keys", ("keys",)', '"quays", ("keys",)'), ENTRIES, "the default `quays` is none of the words keys"),
    ],
    ids=["no module", "no such name", "a function", "an unknown need", "a need of random", "a wrong default"],
)
def test_a_broken_definition_is_one_sentence_at_its_place(
    install: Install, files: dict[str, str], entries: dict[str, str], says: str
) -> None:
    install("powers", files, entries)
    with pytest.raises(PolicyError) as error:
        loads_policy(using("key-power"))
    (mistake,) = error.value.diagnostics
    assert mistake.line == 3 and mistake.snippet[mistake.column - 1 :].startswith("key-power")
    assert mistake.reason.startswith("the signal `key-power` of the package powers 1.2 ") and says in mistake.reason


@pytest.mark.parametrize(
    ("of", "to", "says"),
    [
        ('"powers.on_torch:key_power"', '"powers.on_torch:key_powers"', "the torch recipe of the signal `key-power`"),
        ('"powers.on_torch:key_power"', "None", "gives no torch recipe"),
        ("numpy=key_power, ", "", "the NumPy recipe of the signal `key-power` of the package powers 1.2 is missing"),
        ("numpy=key_power", "numpy=3", "is a int, and no function"),
        ("view.keys()", "view.kyes()", "failed: AttributeError: 'View' object has no attribute 'kyes'"),
        (".sum(-1) ** (1 / p)", ".sum() ** (1 / p)", "gives (), and a number for each of the"),
        (".sum(-1) ** (1 / p)", ".sum(-1) * np.nan", "gives numbers that are not finite"),
        ("keys.norm(p=p, dim=-1)", "keys", "and a number for each unit is wanted"),
        ('needs={"logits"}, ', "", "reads logits, and its definition does not say so"),
    ],
)
def test_a_broken_recipe_is_one_sentence(install: Install, of: str, to: str, says: str) -> None:
    install("powers", spoilt(of, to), ENTRIES)
    with pytest.raises(UsageError) as error:
        check_scorer("sharp" if "logits" in of else "key-power", "fading, one pool")
    assert says in str(error.value)


def test_a_name_that_two_packages_claim_names_both(install: Install) -> None:
    install("powers", FILES, ENTRIES)
    install("forces", {"forces.py": "from powers import *"}, {"key-power": "forces:KEY_POWER"})
    with pytest.raises(PolicyError, match=r"claimed by the package \w+ 1.2 and the package \w+ 1.2; uninstall one"):
        loads_policy(using("key-power"))


def test_a_built_in_signal_is_not_replaced(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("powers", FILES, {"key-norm": "powers:KEY_POWER"})
    assert not loads_policy(using("key-norm")).pools["all"].scorer.signal.args  # type: ignore[union-attr]
    assert main(["list", "signals", "--json"]) == 0
    (listed,) = [e for e in json.loads(capsys.readouterr().out)["signals"] if e["name"] == "key-norm"]
    assert "the package powers 1.2 claims the name `key-norm` too" in listed["summary"] and listed["from"] == "kvpolicy"
    with pytest.raises(UsageError, match="it is kvpolicy's own; choose another"):
        check_scorer("key-norm")


def test_an_unknown_setting_or_signal_is_refused(install: Install) -> None:
    with pytest.raises(UsageError, match="no signal is named 'key-powr'; did you mean `key-"):
        check_scorer("key-powr")
    with pytest.raises(UsageError, match="has no setting 'sideways'"):
        check_scorer("key-norm", "sideways")


@pytest.mark.parametrize("setting", settings("key-anchor"))
def test_built_in_signals_pass_the_same_check(setting: str) -> None:
    assert check_scorer("key-anchor", setting) > 0
