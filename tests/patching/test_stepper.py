"""Recorded steps: what is replayed is the eager run, on both sides, and asks the host nothing."""

import copy

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpolicy import CacheError
from kvpolicy.patching import apply, cache_for
from kvpolicy.runtime import decode, stepping
from kvpolicy.runtime.choosing import Choice
from kvpolicy.runtime.clocks import Clocks
from kvpolicy.runtime.decode import DecodeLoop, decode_loop
from kvpolicy.runtime.layer import PolicyLayer
from kvpolicy.runtime.moment import PLAIN, UPDATE
from kvpolicy.runtime.stepping import Stepper
from kvpolicy.runtime.waiting import HostWaited, no_waiting
from tests.invariants.policies import NAMES, SHAPES, UPDATING, drops, spread, thorough, tight
from tests.patching.tape import TapeRecorder

STEPS = 100
CHOICES = [{}, {"do_sample": True, "top_k": 9, "top_p": 0.9, "temperature": 1.7}]


def host_clocks(cache):
    clocks = cache.clocks
    return (
        clocks.host_t,
        clocks.columns,
        dict(cache.passes),
        cache.moment.kind,
        cache.opened_ahead,
        [(set(clock.host_fills), clock.opened_now) for clock in clocks.streams],
    )


def policy_layers(cache):
    """The layers that keep slots: those of a layer's groups of KV heads where these have slots of their own."""
    return [part for layer in cache.layers for part in getattr(layer, "parts", [layer])]


def device_state(cache):
    tensors = {f"clock {n}": tensor for n, tensor in enumerate(cache.clocks.tensors())}
    for index, layer in enumerate(policy_layers(cache)):
        tensors |= {f"{index}.{name}": tensor for name, tensor in layer.state.tensors.items()}
    return tensors


def prompted(model, padded):
    """A cache that has read a padded batch, and positions [2, 1] of what comes next."""
    cache = cache_for(model, prompt=(11, 17), max_new_tokens=STEPS, batch=2)
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(**padded, position_ids=positions, past_key_values=cache)
    return cache, positions[:, -1:] + 1


@pytest.mark.parametrize("name", thorough(among=SHAPES))
def test_replayed_steps_are_the_eager_ones(build, padded, name, monkeypatch):
    """Tokens in, logits out, both halves of every clock, the kind of every step and all that a cache holds."""
    model = apply(build(), tight(name))
    (eager, positions), (taped, _) = prompted(model, padded), prompted(model, padded)
    recorder = TapeRecorder()
    stepper = Stepper(model, taped, recorder=recorder)
    calls = {"layers": 0, "clocks": 0}

    def counted(owner, method, key):
        original = getattr(owner, method)

        def call(self, *args):
            calls[key] += self in watched
            return original(self, *args)

        monkeypatch.setattr(owner, method, call)

    watched = {taped.clocks, *policy_layers(taped)}
    counted(PolicyLayer, "forward", "layers")
    counted(Clocks, "advance", "clocks")
    tokens = torch.randint(2, 97, (STEPS, 2, 1), generator=torch.Generator().manual_seed(0))
    kinds = set()
    with torch.no_grad():
        stepper.start(tokens[0], positions)
        for token in tokens:
            expected = model(token, position_ids=positions, past_key_values=eager).logits[:, -1]
            kinds.add(UPDATE if eager.passes[UPDATE] > taped.passes[UPDATE] else PLAIN)
            assert torch.equal(stepper.step(token), expected)
            assert host_clocks(eager) == host_clocks(taped)
            positions = positions + 1
    for key, tensor in device_state(taped).items():
        assert torch.equal(tensor, device_state(eager)[key]), key
    assert recorder.replays == STEPS - len(kinds)
    # Each kind ran once plainly and once to be recorded: replays call none of the cache's Python.
    assert calls == {"layers": 2 * len(kinds) * len(policy_layers(taped)), "clocks": 2 * len(kinds)}
    assert taped.stats()["evicted"] > 0 or not drops(taped.plan)


@pytest.mark.parametrize(("name", "settings"), spread(NAMES, CHOICES, SHAPES))
def test_a_loop_over_recorded_steps_says_what_generate_says(build, padded, name, settings, monkeypatch):
    """Chosen inside the recorded step: the same draws, rows that end on their own, and no question in between."""
    model = apply(build(), tight(name))
    recorder = TapeRecorder()
    monkeypatch.setattr(stepping, "recorder_for", lambda *args: recorder)
    settings = {"do_sample": False, "max_new_tokens": 50, "pad_token_id": 0, **settings}

    def generate(**more):
        torch.manual_seed(7)
        return model.generate(**padded, **settings, **more)

    free = generate()
    assert torch.equal(generate(custom_generate=decode_loop), free)
    end = [free[0, 17 + 40].item(), free[1, 17 + 30].item()]
    assert torch.equal(generate(custom_generate=decode_loop, eos_token_id=end), generate(eos_token_id=end))
    assert recorder.replays > 20


class NotOurs(LogitsProcessor):
    """Counts its calls: what no replay could do."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


@pytest.mark.parametrize(
    ("processors", "inside"),
    [
        ([], True),
        ([TemperatureLogitsWarper(0.5), TopKLogitsWarper(5), TopPLogitsWarper(0.5), MinPLogitsWarper(0.1)], True),
        ([SuppressTokensLogitsProcessor([3, 4], "cpu"), TemperatureLogitsWarper(2.0)], True),
        ([RepetitionPenaltyLogitsProcessor(1.2)], False),
        ([NoRepeatNGramLogitsProcessor(2)], False),
        ([MinLengthLogitsProcessor(5, 1), TemperatureLogitsWarper(2.0)], False),
        ([EtaLogitsWarper(0.1)], False),  # torch.distributions asks whether the numbers are sane
        ([NotOurs()], False),
    ],
    ids=lambda value: "-".join(type(each).__name__ for each in value) if isinstance(value, list) else "",
)
def test_what_can_be_chosen_inside_a_step(model, processors, inside, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # the compiler turns it off for good
    logits = torch.randn(2, 97, generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(do_sample=True)
    config._pad_token_tensor = torch.tensor(0)
    ending = [MaxLengthCriteria(40), EosTokenCriteria([5, 9])]
    choice = Choice.of(processors, ending, config, logits)
    assert (choice is not None) == inside
    if choice is not None:
        assert choice.key == Choice.of(copy.deepcopy(processors), ending, config, logits).key
        assert choice.key != Choice.of(processors, ending[:1], config, logits).key
        assert choice.key != Choice.of([*processors, TemperatureLogitsWarper(3.0)], ending, config, logits).key
    assert Choice.of(processors, [MaxTimeCriteria(5.0)], config, logits) is None


PLANTED = {
    "item": lambda tensor: tensor[0].item(),
    "tolist": lambda tensor: tensor.tolist(),
    "bool": lambda tensor: bool(tensor.any()),
    "branch": lambda tensor: 1 if tensor.any() else 0,
    "int": lambda tensor: int(tensor[0]),
    "float": lambda tensor: float(tensor[0]),
    "index": lambda tensor: [5, 6, 7][tensor[0]],
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "numpy": lambda tensor: tensor.numpy(),
    "nonzero": lambda tensor: tensor.nonzero(),
    "where": lambda tensor: torch.where(tensor > 0),
    "select": lambda tensor: torch.masked_select(tensor, tensor > 0),
    "mask": lambda tensor: tensor[tensor > 0],
    "write": lambda tensor: tensor.__setitem__(tensor > 0, torch.zeros(1, dtype=tensor.dtype).expand(2)),
    "equal": lambda tensor: torch.equal(tensor, tensor),
    "unique": lambda tensor: torch.unique(tensor),
    "contains": lambda tensor: 1 in tensor,
    "multinomial": lambda tensor: bool((torch.multinomial(tensor.float(), 1) >= 0).all()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_question_is_caught(name):
    tensor = torch.tensor([1, 0, 2])
    with pytest.raises(HostWaited), no_waiting():
        PLANTED[name](tensor)
    with no_waiting():
        tensor[tensor.argmax()[None]] = tensor.max()
        assert tensor.to(torch.float32).shape == (3,)


@pytest.mark.parametrize(
    ("name", "settings"), spread(NAMES, [{}, {"do_sample": True}, {"repetition_penalty": 1.3}], SHAPES)
)
def test_no_step_asks_the_device_anything(build, padded, name, settings, monkeypatch):
    """Opening the pass, the model, both kinds of update, choosing inside or after the step: no look at a tensor."""
    model = apply(build(), tight(name))
    kinds = []

    def quietly(owner, method):
        original = getattr(owner, method)

        def call(self, *args, **kwargs):
            with no_waiting():
                original(self, *args, **kwargs)
            kinds.extend([self.cache.passes.copy()] if isinstance(self, Stepper) else [])

        monkeypatch.setattr(owner, method, call)

    end = {"eos_token_id": 96, "suppress_tokens": [96]}
    quietly(Stepper, "_run")
    quietly(decode._Run, "_take")
    quietly(decode._Run, "_select")
    model.generate(**padded, custom_generate=decode_loop, max_new_tokens=70, **end, **settings)
    assert len(kinds) == 69
    assert name not in UPDATING or kinds[-1][UPDATE] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_on_a_gpu_captured_steps_wait_for_nothing_and_say_the_same(build, padded, name, do_sample):
    padded = {key: tensor.cuda() for key, tensor in padded.items()}
    model = apply(build().cuda(), tight(name), compile=False)
    texts = []
    for loop in (DecodeLoop(capture=False), DecodeLoop(), DecodeLoop()):
        torch.manual_seed(3)
        settings = {"do_sample": do_sample, "max_new_tokens": 90, "custom_generate": loop}
        texts.append(model.generate(**padded, **settings))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])
    cache, positions = prompted(model, padded)
    stepper = Stepper(model, cache)
    with torch.no_grad():
        stepper.start(torch.full((2, 1), 5, device="cuda"), positions)
        for column in range(80):
            torch.cuda.set_sync_debug_mode("error" if column > 40 else "default")
            try:
                stepper.step(stepper.tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(stepper.recorder._graphs) == len([kind for kind in (PLAIN, UPDATE) if cache.passes[kind]])


def test_who_wants_to_see_every_pass_does(model, policies, prompt, greedy, monkeypatch):
    """A hook or a forward of others would be passed by in a replay: nothing is recorded while it is there."""
    apply(model, policies["window"])
    recorder = TapeRecorder()
    monkeypatch.setattr(stepping, "recorder_for", lambda *args: recorder)
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    watched = model.generate(prompt, custom_generate=decode_loop, **greedy)
    assert len(seen) == 24 and not recorder.replays
    hook.remove()
    model.generate(prompt, return_dict_in_generate=True, output_hidden_states=True, **greedy)  # hooks that stay
    assert torch.equal(model.generate(prompt, custom_generate=decode_loop, **greedy), watched)
    assert len(seen) == 24 and recorder.replays == 22
    assert torch.equal(model.generate(prompt, custom_generate=DecodeLoop(capture=False), **greedy), watched)
    assert recorder.replays == 22


def test_a_step_that_fails_leaves_the_pass_open_and_says_so(model, policies, padded):
    apply(model, policies["scored"])
    cache, positions = prompted(model, padded)
    stepper = Stepper(model, cache)
    failing = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            stepper.step(positions)
        failing.remove()
        with pytest.raises(CacheError, match="failed halfway"):
            model(positions, past_key_values=cache)


def test_more_than_a_few_ways_to_choose_start_over(model, policies, prompt, greedy, monkeypatch):
    apply(model, policies["window"])
    recorder = TapeRecorder()
    monkeypatch.setattr(stepping, "recorder_for", lambda *args: recorder)
    texts = {}
    for loop in (None, decode_loop):
        for temperature in (0.5, 0.6, 0.7, 0.8, 0.9, 1.1):
            torch.manual_seed(1)
            settings = {**greedy, "do_sample": True, "temperature": temperature, "custom_generate": loop}
            texts[loop, temperature] = model.generate(prompt, **settings)
    assert all(torch.equal(text, texts[None, temperature]) for (_, temperature), text in texts.items())
    assert 0 < len(recorder.tapes) <= stepping.KEPT_CHOICES
