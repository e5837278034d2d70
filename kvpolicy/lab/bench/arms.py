"""Ways to decode: a policy's cache, and transformers' own caches. Each reads its prompt, then steps, one token a row.

Every step is fed the same tokens and gives logits; nothing is sampled, so that no arm ends early and all run alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache

from kvpolicy.attention import Formula
from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.cases import Case
from kvpolicy.lab.bench.counting import graphs_compiled
from kvpolicy.lab.bench.models import random_tokens, twin
from kvpolicy.lab.bench.roofline import slot_bytes, token_bytes
from kvpolicy.lab.bench.timing import Steps, timed
from kvpolicy.patching import apply, cache_for, compile_report
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache
from kvpolicy.runtime.stepping import Stepper

AT_BUDGET = "-at-budget"
AGAINST = ("dense", "dense-at-budget", "hf-dynamic", "hf-dynamic-at-budget", "hf-static", "hf-flex")
"""What policies can be held against: full caches, our own and those of transformers, as long as the context or the
budget."""


class Arm(ABC):
    """One way to decode. ``steps`` are those that were timed."""

    backend = ""
    compiled = False
    note = ""

    def __init__(self, name: str, case: Case, model: Any) -> None:
        self.name, self.case, self.model = name, case, model
        self.device: torch.device = model.device
        self.steps = Steps()
        self.tokens = random_tokens(model, case.batch, 1, seed=1)

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """What the cache should allocate."""

    @property
    @abstractmethod
    def read_bytes(self) -> int:
        """Keys and values that attention must read in one step, at the least."""

    @abstractmethod
    def build(self) -> None:
        """Allocate the cache."""

    @abstractmethod
    def step(self) -> str:
        """Run one step, and say of what kind it was."""

    @abstractmethod
    def _prompt(self, ids: Tensor) -> None:
        """Run the prompt [B, N] through the model, and fill the cache up with random numbers where that is said."""

    def read(self) -> float:
        """Read the prompt; returns seconds, those of the filling left out."""
        ids = random_tokens(self.model, self.case.batch, self.case.prompt)
        seconds = timed(lambda: self._prompt(ids), self.device)
        if self.case.prompt < self.case.room:
            self.fill()
        return seconds

    @abstractmethod
    def fill(self) -> None:
        """Put random numbers where a longer prompt would have left keys and values."""

    def rewind(self, count: int) -> None:  # noqa: B027 (most caches have a fixed size)
        """Undo what the last ``count`` steps added."""

    def graphs(self) -> dict[str, int]:
        """What torch.compile did for this arm."""
        return {"graphs": 0, "graph_breaks": 0, "recompiles": 0}

    def evicted(self) -> int:
        """Tokens that left so far, over all layers, rows and KV heads."""
        return 0


class PolicyArm(Arm):
    """A policy under the model, the full cache of kvpolicy among them."""

    def __init__(self, name: str, case: Case, model: Any, *, compile: bool, backend: str) -> None:
        super().__init__(name, case, twin(model))
        self.compiled = compile
        apply(self.model, case.policy, compile=compile, backend=backend)

    @property
    def cache_bytes(self) -> int:
        return self.case.plan.bytes

    @property
    def read_bytes(self) -> int:
        return slot_bytes(self.case.plan)

    def build(self) -> None:
        plan = self.case.plan
        self.cache: PolicyCache = cache_for(
            self.model, prompt=plan.prompt, max_new_tokens=plan.max_new_tokens, batch=plan.batch
        )
        self.backend = self.cache.backend
        self.stepper = Stepper(self.model, self.cache)

    def _prompt(self, ids: Tensor) -> None:
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)

    def fill(self) -> None:
        """Fill every empty slot. The clocks do not know of it, so that a policy sees no more tokens than it did."""
        for layer in self.cache.parts():
            state = layer.state
            empty = state.position < 0
            shape = state.keys.shape
            places = torch.arange(shape[2], device=self.device, dtype=state.position.dtype).expand_as(state.position)
            state.position.copy_(torch.where(empty, places, state.position))
            for row in range(shape[0]):  # a row at a time: a second cache of this size may not fit
                for part in (state.keys[row], state.values[row]):
                    part.copy_(torch.where(empty[row, ..., None], torch.randn_like(part), part))
            for keys, values, owner in state.shared_slots:
                heads = torch.arange(owner.shape[1], device=self.device, dtype=owner.dtype) % shape[1]
                for part in (keys, values):
                    part.copy_(torch.where((owner < 0)[..., None], torch.randn_like(part), part))
                owner.copy_(torch.where(owner < 0, heads, owner))

    def advance(self, count: int) -> None:
        """Let ``count`` generated tokens with random keys, values and queries pass through the cache alone."""
        shape = self.cache.plan.geometry
        heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        generator = torch.Generator(self.device).manual_seed(2)
        sets = [
            [
                torch.randn(
                    self.case.batch, number, 1, shape.head_dim,
                    dtype=self.model.dtype, device=self.device, generator=generator,
                )
                for number in heads
            ]
            for _ in range(64)
        ]  # fmt: skip
        for number in range(count):
            self.cache.begin(1)
            for index, layer in enumerate(self.cache.layers):
                layer.forward(*sets[(number + index) % len(sets)], Formula(shape.head_dim**-0.5))
            self.cache.finish()

    def step(self) -> str:
        updates = self.cache.passes["update"]
        self.stepper.step(self.tokens)
        return "update" if self.cache.passes["update"] > updates else "plain"

    def graphs(self) -> dict[str, int]:
        return dict(vars(compile_report(self.model)))

    def evicted(self) -> int:
        if not any(pool.evicts for layer in self.case.plan.layers for pool in layer.pools):
            return 0  # what a full cache was filled up with is overwritten, not evicted
        return int(self.cache.stats()["evicted"])


class TransformersArm(Arm):
    """A cache of transformers, under an unpatched model."""

    def __init__(self, name: str, case: Case, model: Any) -> None:
        super().__init__(name, case, twin(model))
        self.shape = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
        self.backend = self.model.config._attn_implementation

    @property
    def cache_bytes(self) -> int:
        return token_bytes(self.shape) * self.case.batch * self.case.held

    @property
    def read_bytes(self) -> int:
        return self.cache_bytes

    @abstractmethod
    def _cache(self) -> Cache:
        """An empty cache."""

    def build(self) -> None:
        self.cache = self._cache()

    def _prompt(self, ids: Tensor) -> None:
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)

    def fill(self) -> None:
        """Let the cache take random keys and values, as a pass of the model would hand them over."""
        shape = self.shape
        size = (self.case.batch, shape.kv_heads, self.case.room - self.case.prompt, shape.head_dim)
        for layer in range(shape.layers):
            key, value = (torch.randn(size, dtype=self.model.dtype, device=self.device) for _ in range(2))
            self.cache.update(key, value, layer)

    def step(self) -> str:
        self.model(self.tokens, past_key_values=self.cache)
        return "plain"


class DynamicArm(TransformersArm):
    """DynamicCache, eager: keys and values are copied into longer tensors at each step."""

    note = "eager, and it copies the whole cache into longer tensors at each step"

    def _cache(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def rewind(self, count: int) -> None:
        self.cache.crop(-count)


class StaticArm(TransformersArm):
    """StaticCache, its steps compiled as `generate` compiles them on a GPU."""

    def __init__(self, name: str, case: Case, model: Any, *, compile: bool) -> None:
        super().__init__(name, case, model)
        self.compiled = compile
        group = self.shape.group
        if compile and group > 1:
            self.note = (
                f"compiled, it copies keys and values to all query heads over the whole length: (1 + 2·{group}) times "
                "the traffic that is counted"
            )
        config = None if self.device.type == "cuda" else CompileConfig(mode="default")  # None: as generate does
        self.call = self.model.get_compiled_call(config) if compile else self.model

    def _cache(self) -> Cache:
        return StaticCache(config=self.model.config, max_cache_len=self.case.held)

    def build(self) -> None:
        super().build()
        shape = self.shape
        self.cache.early_initialization(
            self.case.batch, shape.kv_heads, shape.head_dim, self.model.dtype, self.model.device
        )
        self.compiled_so_far = [0, 0]

    def step(self) -> str:
        before = graphs_compiled()
        if self.device.type == "cuda" and self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self.call(self.tokens, past_key_values=self.cache)
        for number, (now, then) in enumerate(zip(graphs_compiled(), before, strict=True)):
            self.compiled_so_far[number] += now - then  # other arms compile in this process, too
        return "plain"

    def graphs(self) -> dict[str, int]:
        graphs, breaks = self.compiled_so_far
        return {"graphs": graphs, "graph_breaks": breaks, "recompiles": max(0, graphs - breaks - 1)}


class FlexArm(StaticArm):
    """StaticCache under flex_attention, which reads keys and values once per KV head."""

    def __init__(self, name: str, case: Case, model: Any, *, compile: bool) -> None:
        super().__init__(name, case, model, compile=compile)
        self.model.set_attn_implementation("flex_attention")
        self.backend, self.note = "flex_attention", "it makes a block mask at each step"


def refusal(name: str, device: torch.device) -> str:
    """Why an arm cannot run on this device; "" where it can."""
    if name == "hf-flex" and device.type != "cuda":
        return "flex_attention has its decode kernel on CUDA only; on a CPU it would compute whole attention maps"
    return ""


def make_arm(name: str, case: Case, model: Any, *, compile: bool, backend: str) -> Arm:
    """The arm of this name; a policy's where it is none of ``AGAINST``.

    Raises:
        UsageError: it cannot run on this device.
    """
    if reason := refusal(name, model.device):
        raise UsageError(f"{name}: {reason}; drop it from --against")
    if name.removesuffix(AT_BUDGET) == "hf-dynamic":
        return DynamicArm(name, case, model)
    if name == "hf-static":
        return StaticArm(name, case, model, compile=compile)
    if name == "hf-flex":
        return FlexArm(name, case, model, compile=compile)
    return PolicyArm(name, case, model, compile=compile, backend=backend)
