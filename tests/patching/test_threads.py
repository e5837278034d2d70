"""Threads: two models with their policies, two caches on each; every answer is what it is alone."""

import threading

import pytest
import torch

from kvpolicy.patching import apply, compile_report
from kvpolicy.runtime.compiling import CompileReport

NAMES = ("window", "everything")  # one kind of step each, so one graph


def at_once(*calls):
    """What each call returns, all run in threads of their own."""
    results, errors = [None] * len(calls), []

    def run(index):
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("compile", [None, "eager"], ids=["eager", "compiled"])
def test_two_caches_on_each_of_two_models(build, policies, prompt, compile):
    """Nothing is compiled when they start: a trace in one thread changes torch for all of them, and must wait."""
    settings = {"do_sample": False, "max_new_tokens": 10}
    prompts = (prompt, prompt[:, :9])
    models = [apply(build(seed=seed, num_hidden_layers=2), policies[name]) for seed, name in enumerate(NAMES)]
    expected = [model.generate(ids, **settings) for model in models for ids in prompts]
    models = [
        apply(build(seed=seed, num_hidden_layers=2), policies[name], compile=compile) for seed, name in enumerate(NAMES)
    ]
    calls = [lambda model=model, ids=ids: model.generate(ids, **settings) for model in models for ids in prompts]
    torch._dynamo.reset()
    found = at_once(*calls, *calls)
    assert all(map(torch.equal, found, expected * 2))
    for model in models:
        assert compile_report(model) == CompileReport(graphs=0 if compile is None else 1)
