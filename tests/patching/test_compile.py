"""Compiled steps: one graph per kind of step and layer shape, no break, no recompile, the tokens of eager mode."""

import copy
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache

from kvpolicy import CacheError, ModelError
from kvpolicy.language import loads_policy
from kvpolicy.patching import apply, cache_for, compile_report, patch_of, remove
from kvpolicy.runtime.compiling import CompileReport, StepCompiler
from kvpolicy.runtime.decode import decode_loop
from kvpolicy.runtime.unchanged import Unchanged
from tests.invariants.policies import spread
from tests.patching.conftest import FAMILIES

KINDS = {"everything": 1, "window": 1, "scored": 2, "paged": 2}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "name"), spread(FAMILIES, KINDS))
def test_one_graph_per_kind_of_step(build, family, policies, padded, greedy, name):
    model = apply(build(family), policies[name])
    expected = model.generate(**padded, **greedy)
    remove(model)
    apply(model, policies[name], compile="eager")
    assert torch.equal(model.generate(**padded, **greedy), expected)
    assert torch.equal(model.generate(**padded, custom_generate=decode_loop, **greedy), expected)
    assert compile_report(model) == CompileReport(graphs=KINDS[name], graph_breaks=0, recompiles=0)


@pytest.mark.parametrize("name", ["window", "paged"])
def test_what_adds_no_graph(model, policies, padded, prompt, greedy, name):
    """A new prompt length, a fresh cache, interleaved caches, no padding, a plain call with positions for all rows."""
    apply(model, policies[name], compile="eager")
    model.generate(**padded, **greedy)
    graphs = compile_report(model).graphs
    model.generate(**padded, **greedy)
    model.generate(prompt, **greedy)
    model.generate(torch.cat([prompt, prompt], 1), **greedy)
    caches = [cache_for(model, prompt=(1, 128), max_new_tokens=24, batch=2) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt, past_key_values=cache)
        for column in range(12):
            for cache in caches:
                model(prompt[:, column : column + 1], past_key_values=cache)
    assert compile_report(model) == CompileReport(graphs=graphs)


def test_like_prompts_are_planned_alike_as_far_as_the_policy_has_room(model, prompt, greedy):
    """raas refuses prompts beyond its total; a cache made by hand is as long as it was asked."""
    apply(model, "raas", budget=64, page_size=8, compile="eager")
    output = model.generate(prompt, return_dict_in_generate=True, **greedy)
    low, high = output.past_key_values.plan.prompt
    assert low == 1 and 17 < high < 64
    remove(model)
    apply(model, "dense", compile="eager")
    output = model.generate(prompt, return_dict_in_generate=True, **greedy)
    assert output.past_key_values.plan.prompt == (1, 128)
    assert cache_for(model, prompt=17, max_new_tokens=24).plan.prompt == (17, 17)


def test_a_graph_for_each_layer_shape_and_no_more(build, prompt, greedy):
    policy = loads_policy("""
kvpolicy: 1
name: pyramid
pools: {all: {admit: all, budget: "if(layer < 2, 12, 8)"}}
""")
    model = apply(build(num_hidden_layers=5), policy)
    expected = model.generate(prompt, **greedy)
    remove(model)
    apply(model, policy, compile="eager")
    assert torch.equal(model.generate(prompt, **greedy), expected)
    assert compile_report(model) == CompileReport(graphs=2)


def test_a_prompt_never_enters_a_graph(model, policies, prompt):
    apply(model, policies["window"], compile="eager")
    model.generate(prompt, do_sample=False, max_new_tokens=1)
    model.generate(prompt, do_sample=False, max_new_tokens=1, prefill_chunk_size=1)
    assert compile_report(model) == CompileReport()


def test_another_batch_or_state_of_torch_has_its_own_graph(model, policies, prompt, greedy):
    apply(model, policies["window"], compile="eager")
    model.generate(prompt, **greedy)
    model.generate(prompt[:1], **greedy)
    assert compile_report(model) == CompileReport(graphs=2)
    with torch.inference_mode():
        model.generate(prompt, **greedy)
    assert compile_report(model) == CompileReport(graphs=3)
    model.to(torch.bfloat16)
    model.generate(prompt, **greedy)
    assert compile_report(model) == CompileReport(graphs=4)


def test_a_second_graph_raises_instead_of_falling_back(model, policies, prompt, greedy):
    apply(model, policies["window"], compile="eager")
    model.generate(prompt, **greedy)
    model.model.layers[1].self_attn.scaling *= 2  # dynamo guards on it, and no key of ours names it
    with pytest.raises(ModelError, match=r"LlamaDecoderLayer_update_0 would need a second graph.*TORCH_LOGS"):
        model.generate(prompt, **greedy)
    assert compile_report(model).recompiles == 0


def swap_weight(layer: nn.Module) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.data * 2)


def swap_module(layer: nn.Module) -> None:
    layer.mlp.up_proj = copy.deepcopy(layer.mlp.up_proj)
    layer.mlp.up_proj.weight.data.mul_(2)


class Doubled(nn.Linear):
    """A linear layer of another kind, as adapters and quantisers put in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def put_in_another_kind(layer: nn.Module) -> None:
    before, layer.mlp.up_proj = layer.mlp.up_proj, Doubled(32, 48, bias=False)
    layer.mlp.up_proj.weight = before.weight


def freeze(layer: nn.Module) -> None:
    swap_weight(layer)
    layer.requires_grad_(False)


@pytest.mark.parametrize("change", [swap_weight, swap_module, put_in_another_kind, freeze])
def test_a_lawful_change_between_steps_is_seen(model, policies, prompt, greedy, change):
    apply(model, policies["window"], compile="eager")
    before = model.generate(prompt, **greedy)
    assert all(step.direct is not None for step in model.model.layers[0].forward.compiler._steps.values())
    change(model.model.layers[0])
    after = model.generate(prompt, **greedy)
    remove(model)
    apply(model, policies["window"])
    assert torch.equal(after, model.generate(prompt, **greedy))
    assert not torch.equal(before, after)


def test_steps_survive_a_reset_of_the_compiler(model, policies, prompt, greedy):
    apply(model, policies["window"], compile="eager")
    expected = model.generate(prompt, **greedy)
    torch._dynamo.reset()
    assert torch.equal(model.generate(prompt, **greedy), expected)


def add_hook(layer: nn.Module) -> None:
    layer.mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def cast_in_place(layer: nn.Module) -> None:
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.double()


def turn_a_number(layer: nn.Module) -> None:
    layer.self_attn.scaling *= 2


def note_in_a_list(layer: nn.Module) -> None:
    layer.mlp.merged.append("adapter")


@pytest.mark.parametrize("change", [swap_weight, swap_module, add_hook, cast_in_place, turn_a_number, note_in_a_list])
def test_a_snapshot_sees_every_change(model, change):
    layer = model.model.layers[0]
    layer.mlp.merged = []
    snapshot = Unchanged(layer)
    assert snapshot.still()
    change(layer)
    assert not snapshot.still()


def test_a_limit_of_our_own_for_a_torch_without_one(model, policies, prompt, greedy, monkeypatch):
    monkeypatch.setattr("kvpolicy.runtime.compiled._LIMIT", {})
    apply(model, policies["window"], compile="eager")
    model.generate(prompt, **greedy)
    model.model.layers[1].self_attn.scaling *= 2
    with pytest.raises(ModelError, match="would need a second graph"):
        model.generate(prompt, **greedy)
    assert compile_report(model) == CompileReport(graphs=2, recompiles=1)


@torch._dynamo.config.patch(accumulated_recompile_limit=1)
def test_graphs_of_many_models_and_plans_share_no_limit(build, policies, prompt, greedy):
    """torch counts graphs by code object and stops compiling at a limit: ours are copies, one for each graph."""
    for seed in range(2):
        model = apply(build(seed=seed), policies["window"], compile="eager")
        for rows in (1, 2):
            model.generate(prompt[:rows], **greedy)
        assert compile_report(model) == CompileReport(graphs=2)


def test_other_caches_stay_eager(model, policies, prompt, greedy):
    expected = model.generate(prompt, cache_implementation="static", **greedy)
    apply(model, policies["window"], compile="eager")
    assert torch.equal(model.generate(prompt, cache_implementation="static", **greedy), expected)
    assert compile_report(model) == CompileReport()


def test_hidden_states_come_out_of_compiled_layers(model, policies, prompt, greedy):
    apply(model, policies["window"], compile="eager")
    output = model.generate(prompt, return_dict_in_generate=True, output_hidden_states=True, **greedy)
    assert len(output.hidden_states) == 24
    assert len(output.hidden_states[-1]) == 4
    assert compile_report(model).graphs == 1


def test_on_for_cuda_and_off_for_the_cpu(model, policies):
    assert patch_of(apply(model, policies["window"])).compiler is None
    remove(model)
    assert patch_of(apply(model, policies["window"], compile=True)).compiler.backend == "inductor"
    remove(model)
    assert patch_of(apply(model, policies["window"], compile=False)).compiler is None
    assert compile_report(model) == CompileReport()


def test_a_layer_whose_forward_was_replaced_is_not_compiled_over(model, policies, prompt, greedy):
    layer = model.model.layers[1]
    layer.forward = layer.forward
    with pytest.raises(ModelError, match="forward was replaced"):
        apply(model, policies["window"], compile="eager")
    apply(model, policies["window"]).generate(prompt, **greedy)


def test_compiled_code_stays_in_its_process(model, policies, prompt, greedy):
    apply(model, policies["window"], compile="eager")
    model.generate(prompt, **greedy)
    again = copy.deepcopy(model)
    assert compile_report(again) == CompileReport()
    again.generate(prompt, **greedy)
    assert compile_report(again).graphs == compile_report(model).graphs == 1
    assert isinstance(patch_of(again).compiler, StepCompiler)


class TestAModelThatTheUserCompiled:
    """Whole-model compilation cannot see passes being opened: it breaks around the hooks, or says what is wrong."""

    @pytest.fixture
    def expected(self, model, policies, prompt, greedy):
        greedy["max_new_tokens"] = 9
        return apply(model, policies["scored"]).generate(prompt, **greedy)

    @pytest.mark.slow
    def test_with_breaks_it_is_right(self, model, prompt, greedy, expected):
        model.compile(backend="eager")
        with torch._dynamo.config.patch(recompile_limit=64):
            assert torch.equal(model.generate(prompt, **greedy), expected)

    def test_fullgraph_says_what_to_do(self, model, prompt, expected):
        cache = cache_for(model, prompt=17, max_new_tokens=4, batch=2)
        with torch.no_grad(), pytest.raises(Exception, match=r"kvpolicy\.apply\(model, policy, compile=True\)"):
            torch.compile(model, backend="eager", fullgraph=True)(prompt, past_key_values=cache)

    def test_past_the_hooks_it_raises_on_the_host(self, model, prompt, expected):
        cache = cache_for(model, prompt=17, max_new_tokens=4, batch=2)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            with pytest.raises(CacheError, match="not opened"):
                torch.compile(model.model.forward, backend="eager")(prompt[:, :1], past_key_values=cache)

    def test_with_another_cache_it_is_one_graph_as_before(self, model, prompt, expected):
        runs = (torch.compile(model, backend="eager", fullgraph=True), model)
        caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
        with torch.no_grad():
            assert torch.equal(*(run(prompt, use_cache=False).logits for run in runs))
            for ids in (prompt, prompt[:, :1]):
                mine, eager = (run(ids, past_key_values=cache).logits for run, cache in zip(runs, caches, strict=True))
                torch.testing.assert_close(mine, eager)


@pytest.mark.parametrize("name", [pytest.param("scored", marks=pytest.mark.slow), "paged"])
def test_the_generated_code_copies_no_cache(model, policies, prompt, name):
    """Inductor writes slots in place: no buffer of the size of the keys is made or copied in a step."""
    apply(model, policies[name])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=13)
    remove(model)
    apply(model, policies[name], compile=True)
    output, codes = run_and_get_code(model.generate, prompt, do_sample=False, max_new_tokens=13)
    assert torch.equal(output, expected)
    assert compile_report(model) == CompileReport(graphs=2)
    keys = cache_for(model, prompt=(1, 128), max_new_tokens=13, batch=2).layers[0].state.keys
    assert len(codes) == 2
    for code in codes:
        made = re.findall(r"empty_strided_cpu\(\((.*?)\)", code)
        sizes = [torch.Size(int(size) for size in shape.split(",") if size.strip()).numel() for shape in made]
        assert max(sizes) < keys.numel()
