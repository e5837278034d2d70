"""Apply and remove, over and over and cut off anywhere: nothing remains, and nothing grows."""

import copy
import gc
import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpolicy.patching
from kvpolicy.patching import apply, remove
from kvpolicy.patching.changes import Journal

PATCHING = str(Path(kvpolicy.patching.__file__).parent)


def portrait(model):
    """All that a policy could leave on a model or beside it: attributes by identity, hooks, configs, classes, weights,
    what is registered with transformers, and torch's own lists."""
    held, classes = {}, {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            inner = isinstance(value, dict)
            held[name, key] = (id(value), {each: id(of) for each, of in value.items()} if inner else None)
            if isinstance(value, PreTrainedConfig):
                held[name, key, "says"] = copy.deepcopy(value.__dict__)
        for parent in type(module).__mro__:
            classes[parent] = {key: id(value) for key, value in vars(parent).items() if key != "__abstractmethods__"}
    weights = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    lists = [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, torch._dynamo.eval_frame.cached_backends]
    lists += [
        getattr(torch_modules, name) for name in dir(torch_modules) if name.startswith("_global_") and "hook" in name
    ]
    registered = [{key: id(value) for key, value in each.items()} for each in lists if hasattr(each, "items")]
    return held, classes, registered, weights


def same(before, after):
    """Whether two portraits show the same, weights bit for bit."""
    (*rest, weights), (*now, heavier) = before, after
    for old, new in zip(rest, now, strict=True):
        assert old == new, _difference(old, new)
    assert weights.keys() == heavier.keys()
    return all(
        at == to and torch.equal(old, new)
        for (at, old), (to, new) in zip(weights.values(), heavier.values(), strict=True)
    )


def _difference(old, new):
    if isinstance(old, list):
        return next(_difference(*pair) for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return {key: (old.get(key), new.get(key)) for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def ours_alive():
    """How many objects of our own classes there are, by class."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("kvpolicy."))


def changes(attempt):
    """Every change of a model that `attempt` makes through its journal, told before it is made: the journal's own
    methods, whatever they are called."""
    names = [name for name, _ in inspect.getmembers(Journal, inspect.isfunction) if name[0] != "_" and name != "undo"]
    return Watched({getattr(Journal, name).__code__ for name in names}, attempt)


class Watched:
    """Runs something and calls ``at(number)`` before each step of it: each line of the code that is watched, or where
    none is named, of every file of the seam."""

    def __init__(self, codes, attempt):
        self.codes, self.attempt, self.steps = codes, attempt, 0

    def run(self, stop=None, error=KeyboardInterrupt):
        self.steps = 0

        def line(frame, event, arg):
            if event == "line":
                self.steps += 1
                if self.steps == stop:
                    sys.settrace(None)
                    raise error
            return line

        def call(frame, event, arg):
            code = frame.f_code
            return line if code in self.codes or (not self.codes and code.co_filename.startswith(PATCHING)) else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            self.attempt()
        finally:
            sys.settrace(before)
        return self.steps


@pytest.mark.parametrize(
    ("times", "compile"),
    [(11, None), (11, "eager"), *(pytest.param(1000, how, marks=pytest.mark.slow) for how in (None, "eager"))],
)
def test_many_times_leave_nothing(times, compile, build, policies, prompt):
    """The first time registers an attention function and fills what is cached by text; from then on nothing is new."""
    model = build()
    model.generate(prompt, do_sample=False, max_new_tokens=2)
    for policy in (policies["window"], policies["paged"]):
        apply(model, policy, compile=compile)
        model.generate(prompt, do_sample=False, max_new_tokens=2)
        remove(model)
    alive, before = ours_alive(), portrait(model)
    for time in range(times):
        apply(model, policies["window" if time % 2 else "paged"], compile=compile)
        if time % 10 == 0:
            model.generate(prompt, do_sample=False, max_new_tokens=2)
        remove(model)
    assert ours_alive() == alive
    assert same(before, portrait(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(MemoryError, marks=pytest.mark.slow)])
def test_an_exception_at_every_change(error, build, policies):
    """Before each line of each method of the journal: between noting a change and making it as well."""
    model = build(num_hidden_layers=2)
    apply(model, policies["window"], compile="eager")
    remove(model)
    before = portrait(model)
    watched = changes(lambda: apply(model, policies["window"], compile="eager"))
    steps = watched.run()
    remove(model)
    assert steps > 40
    for step in range(1, steps + 1):
        with pytest.raises(error):
            watched.run(step, error)
        assert same(before, portrait(model)), f"cut off before step {step}"
    assert watched.run() == steps
    remove(model)


@pytest.mark.slow
def test_an_exception_at_every_line_of_the_seam(build, policies):
    """The same before every line of every file of kvpolicy.patching that `apply` runs."""
    model = build(num_hidden_layers=2)
    apply(model, policies["window"], compile="eager")
    remove(model)
    before = portrait(model)
    watched = Watched(set(), lambda: apply(model, policies["window"], compile="eager"))
    steps = watched.run()
    remove(model)
    for step in range(1, steps + 1):
        try:
            watched.run(step)
        except KeyboardInterrupt:
            assert same(before, portrait(model)), f"cut off before line {step} of {steps}"
        else:
            remove(model)
    assert same(before, portrait(model))
