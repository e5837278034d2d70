"""compile="background": another process compiles, tokens come eagerly meanwhile, and nothing is silent."""

import copy
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import kvpolicy
from kvpolicy import decode_loop
from kvpolicy.patching import apply, compile_report, patch_of, remove
from kvpolicy.patching.ahead import BackgroundCompiler
from kvpolicy.runtime.compiling import CompileReport


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_background(model, policy, backend):
    apply(model, policy, compile="background")
    compiler = patch_of(model).compiler
    said = []
    compiler.backend, compiler.notify = backend, said.append
    return compiler, said


def decode_until(model, prompt, expected, done):
    """Texts, one after another, every one as it must be, until something is so."""
    start = time.monotonic()
    assert torch.equal(generate(model, prompt), expected)
    while not done() and time.monotonic() - start < 600:
        assert torch.equal(generate(model, prompt), expected)
    assert done()


def generate(model, prompt):
    return model.generate(prompt, do_sample=False, max_new_tokens=24, custom_generate=decode_loop)


@pytest.mark.parametrize("name", [pytest.param("scored", marks=pytest.mark.slow), "window"])
def test_tokens_come_eagerly_until_the_other_process_is_done(model, policies, prompt, name):
    expected = generate(apply(model, policies[name]), prompt)
    remove(model)
    compiler, said = in_background(model, policies[name], "eager")
    assert torch.equal(generate(model, prompt), expected)
    assert compile_report(model) == CompileReport() and not compiler.settled
    assert said == ["compiling the step in another process; tokens come eagerly meanwhile"]
    decode_until(model, prompt, expected, lambda: compiler.settled)
    assert torch.equal(generate(model, prompt), expected)
    assert compile_report(model) == CompileReport(graphs=2 if name == "scored" else 1)
    assert len(said) == 2 and said[1].startswith("compiled in ") and said[1].endswith("come from compiled steps")


@pytest.mark.slow
def test_a_failure_is_said_once_and_steps_stay_eager(model, policies, prompt):
    expected = generate(apply(model, policies["window"]), prompt)
    remove(model)
    compiler, _ = in_background(model, policies["window"], "no such backend")
    with pytest.warns(UserWarning, match=r"could not be compiled in another process \(.*no such backend.*stay eager"):
        decode_until(model, prompt, expected, lambda: compiler.settled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model, prompt), expected)
    assert compile_report(model) == CompileReport()


def test_removal_and_copies_leave_no_process_behind(model, policies, prompt):
    compiler, _ = in_background(model, policies["window"], "eager")
    generate(model, prompt)
    again = patch_of(copy.deepcopy(model)).compiler
    assert isinstance(again, BackgroundCompiler) and again._process is None
    process, file = compiler._process[1:3]
    remove(model)
    assert process.poll() is not None and not file.exists() and compiler._process is None


SCRIPT = """
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
import kvpolicy
from kvpolicy.language import loads_policy
from kvpolicy.patching import compile_report, patch_of

policy = loads_policy(open("policy.yaml").read())
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, eos_token_id=None, pad_token_id=0, **shape)).eval()
prompt = torch.randint(2, 97, (2, 17))

def generate():
    return model.generate(prompt, do_sample=False, max_new_tokens=24, custom_generate=kvpolicy.decode_loop)

kvpolicy.apply(model, policy, compile="background")
expected = generate()
while not patch_of(model).compiler.settled:
    assert torch.equal(generate(), expected)
assert torch.equal(generate(), expected)
report = compile_report(model)
print(report.graphs, counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_what_it_compiled_is_taken_from_disk(policies, tmp_path):
    """In a process without pytest, under which torch's keys of equal graphs differ from those of other processes."""
    (tmp_path / "policy.yaml").write_text(policies["scored"].to_yaml())
    environment = {**os.environ, "KVPOLICY_CACHE": str(tmp_path), "PYTHONPATH": str(Path(kvpolicy.__file__).parents[1])}
    run = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "2", "2"], done.stderr[-2000:]
