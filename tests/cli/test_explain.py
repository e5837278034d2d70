"""`kvpolicy explain`: the numbers, in words and as JSON, before any model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvpolicy.attention import Formula, Rotation
from kvpolicy.cli.explain import groups
from kvpolicy.cli.main import main
from kvpolicy.cli.picture import WIDTH, fill, slots
from kvpolicy.language import load_policy, loads_policy, shipped_policies
from kvpolicy.models.shapes import SHAPES
from kvpolicy.plan import ModelGeometry, make_plan
from kvpolicy.plan.timeline import timeline
from kvpolicy.runtime import PolicyCache

ROOT = Path(__file__).parents[2]

SMALL = {
    "raas": {"budget": 128, "page_size": 8},
    "scope-slide": {"alpha": 40, "beta1": 16, "beta2": 16},
    "scope-adaptive": {"alpha": 40, "beta1": 16, "beta2": 16},
    "scope-discontinuous": {"alpha": 40, "beta1": 16, "beta2": 16},
    "random": {"budget": 100},
    "random-unpinned": {"budget": 50},
    "tova": {"budget": 50},
    "window": {"window": 40},
    "streaming-llm": {"sinks": 4, "window": 30},
    "h2o": {"heavy": 10, "recent": 13},
}

EVERYTHING = """
kvpolicy: 1
name: everything
pools:
  hot:
    admit: all
    page: 4
    budget: 96 - 4 * (layer // 8)
    pinned: [{first: 4}, survivors]
    window: 8
    update: {every: 8}
    scorer:
      sum: [{signal: attention, queries: {last: 4}, smooth: {max: 7}, norm: max}, {signal: key-norm, weight: -1}]
    evict: {to: cold}
  cold:
    page: 4
    budget: 64
    store: {bits: 4, group: 4}
    read: {top: 16, scorer: {signal: page-bound}}
    evict: {scope: across-heads, floor: 20%}
overrides: [{layers: 0..1, dense: true}, {heads: [[3, 0]], pools: {hot: {budget: 32}}}]
"""


def explain(capsys, *arguments):
    code = main(["explain", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("arguments", [[], ["--shape", "qwen3-8b"], ["--json"]], ids=" ".join)
def test_it_never_imports_torch(arguments):
    script = (
        "import sys; from kvpolicy.cli.main import main\n"
        f"code = main(['explain', 'raas', *{arguments!r}])\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# Counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_policies())
@pytest.mark.parametrize("prompt", [60, 5])
def test_the_residents_are_those_of_the_runtime_at_every_step(name, prompt):
    steps = 150
    geometry = ModelGeometry("llama", 1, 2, 1, 8)
    plan = make_plan(load_policy(name, set=SMALL.get(name, {})), geometry, prompt=prompt, max_new_tokens=steps)
    lines = timeline(plan, plan.layers[0])
    cache = PolicyCache(plan, rotation=Rotation.none())
    for t in range(steps + 1):
        new = 1 if t else prompt
        key = torch.randn(1, 1, new, 8)
        cache.begin(new, kind="generated" if t else "prompt")
        cache.layers[0].forward(torch.randn(1, 2, new, 8), key, key, Formula(8**-0.5))
        cache.finish()
        held = [int((cache.layers[0].state.pool_positions(pool) >= 0).sum()) for pool in plan.layers[0].pools]
        assert held == [line.resident[t] for line in lines], t
    assert cache.stats()["evicted"] == sum(prompt * ("prompt" in p.admits) + steps * ("generated" in p.admits) for p in
                                           plan.layers[0].pools) - sum(held)  # fmt: skip


def test_the_first_eviction_and_the_changes_of_a_budget():
    policy = load_policy("scope-adaptive", set=SMALL["scope-adaptive"])
    plan = make_plan(policy, ModelGeometry("llama", 1, 2, 1, 8), prompt=60, max_new_tokens=64)
    prompt, generated = timeline(plan, plan.layers[0])
    assert (prompt.first_eviction, prompt.evicted, prompt.budgets) == (0, 20, [(0, 40)])
    assert generated.first_eviction == 17 and generated.budgets[:2] == [(0, 16), (19, 17)]


# For people ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_policies())
def test_every_shipped_policy_is_explained(name, capsys):
    code, out, err = explain(capsys, name)
    assert (code, err) == (0, "")
    policy = load_policy(name)
    assert policy.summary in " ".join(out.split())
    for pool in policy.pools:
        assert f"\n  {pool}\n" in out
    assert all(word in out for word in ("enters", "stays", "read", "stored", "Slots", "full cache", "Memory"))
    assert max(map(len, out.splitlines())) <= 120


def test_raas_in_words(capsys):
    _, out, _ = explain(capsys, "raas", "--set", "budget=768")
    said = " ".join(out.split())
    for words in (
        "enters prompt tokens, in pages of 16",
        "stays everything, for ever",
        "stays max(32, 768 - size(prompt)) = 256 tokens",
        "safe the newest page",
        "the score is the t of the last hit, or of entry",
        "the lowest page is dropped, each KV head for itself",
        "page bounds: two vectors per page and KV head",
        "generated: the first token leaves at t = 257; 1,792 leave in all",
        "784, which keep at most 768 tokens",
    ):
        assert words in said


def test_the_residents_follow_the_budget(capsys):
    _, out, _ = explain(capsys, "scope-adaptive", "--set", "alpha=64", "-c", "100", "-n", "1k")
    rows = {line.split("  ")[1]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["t"][1:] == ["0", "170", "341", "512", "682", "853", "1,024"]
    assert rows["resident"][1:] == ["64", "234", "348", "405", "462", "519", "576"]
    assert "less than the full cache" in out


def test_layers_of_different_sizes_are_shown_apart(tmp_path, capsys):
    file = tmp_path / "pyramid.yaml"
    file.write_text("kvpolicy: 1\nname: pyramid\npools:\n  all:\n    admit: all\n    budget: 100 - 3 * layer\n")
    _, out, _ = explain(capsys, str(file))
    assert "stays   100 - 3 * layer tokens: 13 to 100 by layer" in out
    assert "Slots of layer 2:" in out and "Slots of layer 3:" not in out and "  layer 29: all 13 of 14 slots" in out
    _, out, _ = explain(capsys, str(file), "--layer", "-1")
    assert "Slots of layer 29: 14" in out and "layer 0" not in out


def test_the_whole_language_has_words(tmp_path, capsys):
    file = tmp_path / "everything.yaml"
    file.write_text(EVERYTHING)
    code, out, _ = explain(capsys, str(file))
    said = " ".join(out.split())
    assert code == 0 and "CANNOT RUN YET" in said
    for words in (
        "Pools of layers 0..1", "moves to cold", "what others send", "all that survived an update",
        "smoothed by the max of 7 neighbours", "divided by the largest", "times -1", "in 4 bits", "KV heads compete",
        "16 tokens a step",
    ):  # fmt: skip
        assert words in said


def test_what_never_fires_and_what_cannot_run_is_said(tmp_path, capsys):
    _, out, _ = explain(capsys, "window", "-c", "10", "-n", "20")
    assert "NEVER EVICTS at these lengths: within these budgets all 30 tokens stay" in out
    _, out, _ = explain(capsys, "dense")
    assert "no pool has a budget" in out
    file = tmp_path / "shared.yaml"
    file.write_text("kvpolicy: 1\nname: x\npools: {all: {admit: all, budget: 64, evict: {scope: across-heads}}}\n")
    code, out, _ = explain(capsys, str(file))
    assert code == 0 and "CANNOT RUN YET: pool all: evict scope across-heads while generating." in " ".join(out.split())


def test_a_model_that_cannot_be_patched_is_said(tmp_path, capsys):
    config = tmp_path / "config.json"
    facts = {"model_type": "gpt2", "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    config.write_text(json.dumps(facts))
    for place in (config, tmp_path):
        code, out, _ = explain(capsys, "window", "--model", str(place))
        assert code == 0 and "CANNOT RUN YET: models of type gpt2" in out


# The picture -----------------------------------------------------------------------------------------------------


def test_the_picture_has_a_mark_for_every_part():
    geometry = ModelGeometry("llama", 1, 2, 1, 8)
    policy = load_policy("scope-slide", set={"alpha": 40, "alpha2": 8, "beta1": 16, "beta2": 16})
    plan = make_plan(policy, geometry, prompt=60, max_new_tokens=100)
    group = next(groups(plan))
    prompt, generated, legend = slots(group.layer, group.lines)
    assert "32 ▒ + 8 ▓" in prompt and "16 ▒ + 16 ▓ + 1 ·" in generated
    assert generated.index("▒") >= prompt.index("▓")  # it begins where the prompt's slots end
    assert "█" not in legend and "safe while it is new" in legend


@pytest.mark.parametrize("parts", [[("a", 1), ("b", 10_000)], [("a", 5)], [("a", 1), ("b", 1), ("c", 1)]])
def test_every_part_of_a_bar_is_seen(parts):
    bar = fill(parts, WIDTH)
    assert len(bar) == WIDTH and all(mark in bar for mark, _ in parts)


# For machines ----------------------------------------------------------------------------------------------------


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
    (layer,) = facts["layers"]
    assert sum(buffer["bytes"] for buffer in layer["buffers"]) == plan.layers[0].bytes
    assert layer["layers"] == list(range(30))
    assert plan.bytes == 30 * layer["bytes"] + sum(buffer["bytes"] for buffer in facts["clocks"])
    assert layer["residents"]["t"][-1] == 2048 and max(layer["residents"]["tokens"]) == 768
    assert layer["pools"][1]["first_eviction"] == 513
    assert layer["pools"][0]["answers"]["stays"] == "256 tokens"


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_planned_for(name, capsys):
    code, out, _ = explain(capsys, "raas", "--shape", name, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["model"] == name and not facts["unsupported"]
    told = SHAPES[name]
    assert (facts["geometry"]["dtype"], facts["geometry"]["head_dim"]) == (told["dtype"], told["head_dim"])


def test_every_policy_with_every_answer_is_json():
    policy = loads_policy(EVERYTHING)
    plan = make_plan(policy, ModelGeometry("llama", 10, 4, 2, 8), prompt=200, max_new_tokens=100)
    from kvpolicy.cli.explain import Explained, facts

    told = json.dumps(facts(Explained(plan, "here", list(groups(plan)))))
    assert "moves to cold" in told


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["raas", "-c", "2k"], 2, "raas keeps at most 1024 tokens in all, but with a prompt of 2048 tokens"),
        (["raas", "-c", "many"], 2, "'many' is not a number of tokens"),
        (["rass"], 3, "raas"),
        (["raas", "--model", "builtin:huge"], 4, "builtin:tiny"),
        (["raas", "--model", "./nowhere"], 4, "./nowhere"),
        (["raas", "--shape", "llama-3.1"], 4, "llama-3.1-8b"),
        (["raas", "--shape", "qwen3-8b", "--model", "builtin:tiny"], 2, "drop one"),
        (["raas", "--layer", "30"], 2, "this model has layers 0..29"),
        (["raas", "--dtype", "int7"], 4, "int7"),
        (["raas", "--batch", "0"], 2, "batch"),
    ],
)
def test_mistakes_get_a_sentence_and_their_exit_code(arguments, code, words, capsys):
    got, _, err = explain(capsys, *arguments)
    assert got == code, err
    assert words in err and "Traceback" not in err
