"""`kvpolicy explain`: the numbers, in words and as JSON, before any model."""

import json
import subprocess
import sys

import pytest

from kvpolicy.cli.main import main
from kvpolicy.language import load_policy, shipped_policies
from kvpolicy.plan import ModelGeometry, make_plan


def explain(capsys, *arguments):
    code = main(["explain", *arguments])
    return code, *capsys.readouterr()


def test_it_never_imports_torch():
    script = "import sys; from kvpolicy.cli.main import main; main(['explain', 'raas']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", shipped_policies())
def test_every_shipped_policy_is_explained(name, capsys):
    code, out, err = explain(capsys, name)
    assert (code, err) == (0, "")
    policy = load_policy(name)
    for pool in policy.pools:
        assert f"pool {pool}" in out
    assert policy.summary in out


def test_the_json_is_the_plan(capsys):
    code, out, _ = explain(
        capsys, "scope-slide", "--set", "alpha=256", "-c", "1k", "-n", "2k", "--batch", "4", "--json"
    )
    facts = json.loads(out)
    shape = ModelGeometry("llama", 30, 9, 3, 64, "float32")
    plan = make_plan(load_policy("scope-slide", set={"alpha": 256}), shape, batch=4, prompt=1024, max_new_tokens=2048)
    assert code == 0 and facts["schema_version"] == 1
    assert facts["cache_bytes"] == plan.bytes and facts["dense_cache_bytes"] == plan.dense_bytes
    assert facts["resident_bound"] == plan.resident_bound == 256 + 512
    assert sum(buffer["bytes"] for buffer in facts["layers"][0]["buffers"]) == plan.layers[0].bytes
    assert facts["layers"][0]["layers"] == list(range(30))


def test_the_residents_follow_the_budget(capsys):
    _, out, _ = explain(capsys, "scope-adaptive", "--set", "alpha=64", "-c", "100", "-n", "1k")
    assert "t=0: 64   t=256: 320" in out and "t=1024: 576" in out
    assert "full cache" in out and "less than" in out


def test_layers_of_different_sizes_are_shown_apart(tmp_path, capsys):
    file = tmp_path / "pyramid.yaml"
    file.write_text(
        "kvpolicy: 1\nname: pyramid\npools:\n  all:\n    admit: all\n    budget: 100 - 10 * (layer // 15)\n"
    )
    _, out, _ = explain(capsys, str(file))
    assert "layers 0..14" in out and "layers 15..29" in out


def test_what_never_fires_and_what_cannot_run_is_said(tmp_path, capsys):
    _, out, _ = explain(capsys, "window", "-c", "10", "-n", "20")
    assert "never evicts" in out
    file = tmp_path / "compact.yaml"
    file.write_text("kvpolicy: 1\nname: c\npositions: compact\npools: {all: {admit: all, budget: 64}}\n")
    code, out, _ = explain(capsys, str(file))
    assert code == 0 and "cannot run this yet" in out and "positions: compact" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["raas", "-c", "2k"], 2, "raas keeps at most 1024 tokens in all, but with a prompt of 2048 tokens"),
        (["raas", "-c", "many"], 2, "'many' is not a number of tokens"),
        (["rass"], 3, "raas"),
        (["raas", "--model", "builtin:huge"], 4, "builtin:tiny"),
        (["raas", "--model", "./nowhere"], 4, "./nowhere"),
        (["raas", "--dtype", "int7"], 4, "int7"),
        (["raas", "--batch", "0"], 2, "batch"),
    ],
)
def test_mistakes_get_a_sentence_and_their_exit_code(arguments, code, words, capsys):
    got, _, err = explain(capsys, *arguments)
    assert got == code, err
    assert words in err and "Traceback" not in err
