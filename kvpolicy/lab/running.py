"""One prompt through one model under one policy: the text, what was kept of it, and how that compares.

``kvpolicy apply`` prints what this returns.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

import kvpolicy
from kvpolicy.architecture import architectures
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.fidelity.referee import Referee
from kvpolicy.lab.watching import StopWhen, Watch, Write
from kvpolicy.language import Policy
from kvpolicy.patching import applied, cache_for, compile_report, patch_of
from kvpolicy.patching.ahead import BACKGROUND, BackgroundCompiler
from kvpolicy.plan import ModelGeometry, Plan, make_plan
from kvpolicy.runtime import DecodeLoop, PolicyCache


@dataclass(frozen=True)
class Request:
    """What to run. ``compile`` as ``kvpolicy.apply`` takes it, None: on CUDA only, while tokens already come.
    ``temperature`` 0: greedy. ``top_p`` needs a temperature. ``generic`` as ``apply`` takes it."""

    prompt: str
    max_new_tokens: int = 256
    compile: bool | str | None = None
    chat: bool | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0
    compare_dense: bool = False
    generic: bool = False

    def compiles(self, device: str, known: bool = True, ranks: int = 1) -> tuple[bool | str, str]:
        """Whether steps are compiled on this device, or in which way, and why; ``known``: of the model's family;
        ``ranks`` share the model."""
        if self.compile is not None:
            return self.compile, "as asked"
        if not known:
            return False, "nobody tested models of this type; --compile forces it"
        if device.startswith("cuda") and ranks > 1:
            return True, "as on every GPU; --no-compile does without"
        if device.startswith("cuda"):
            return BACKGROUND, "in another process, as on every GPU; --compile waits for it, --no-compile does without"
        return False, "on a CPU that takes half a minute, more than a short text gains; --compile forces it"


@dataclass
class Outcome:
    """What one run gave.

    Tokens are the most of any layer, row and KV head: ``resident_peak`` after an update, where the plan allows
    ``resident_bound``; ``held_peak`` in the middle of a step, where there are ``slots``. ``evicted`` is summed over all
    layers and KV heads. ``residents`` are (t, tokens) after updates. ``tokens_per_second`` leaves the prompt and the
    compilation of steps out. ``ended`` is "text", "length" or "interrupted". ``untested_type`` is the model's, where
    kvpolicy does not know it. Where several ``ranks`` share the model, counts are those of the whole model, and bytes
    those of one rank, the fullest.
    """

    policy: str
    digest: str
    params: dict[str, str]
    model: str
    prompt_tokens: int
    new_tokens: int
    max_new_tokens: int
    text: str
    token_ids: list[int]
    ended: str
    evicted: int
    can_evict: bool
    resident_peak: int
    resident_bound: int
    held_peak: int
    slots: int
    cache_bytes: int
    planned_cache_bytes: int
    dense_cache_bytes: int
    tokens_per_second: float
    prompt_seconds: float
    compile_seconds: float
    compile: bool
    compile_reason: str
    graphs: int
    graph_breaks: int
    recompiles: int
    pools: dict[str, dict[str, Any]]
    residents: list[tuple[int, int]]
    seed: int
    dtype: str
    device: str
    ranks: int = 1
    agreement: dict[str, Any] | None = None
    untested_type: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode(tokenizer: Any, request: Request) -> Tensor:
    """Token ids [1, N] of the prompt, through the chat template where the model has one.

    Raises:
        UsageError: the prompt has no token, or a chat template was asked for that does not exist.
    """
    template = getattr(tokenizer, "chat_template", None)
    if request.chat and not template:
        raise UsageError("this model has no chat template; drop --chat")
    if template and request.chat is not False:
        turns = [{"role": "user", "content": request.prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UsageError("the prompt has no tokens; give some text with -p or -f")
    return ids.long()


def run_policy(
    model: Any,
    tokenizer: Any,
    name: str,
    policy: Policy,
    request: Request,
    *,
    write: Write = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Generate under a policy and account for it. The model is as before afterwards.

    Args:
        name: what the model is called in the outcome.
        write: gets the text piece by piece.
        stop: asked after every token; True ends the text there. Ranks that share the model must all be told the same.
        tell: gets a line when another process begins to compile, and one when it is done.

    Raises:
        UsageError, ModelError: the run cannot be made; nothing was generated.
    """
    ids = encode(tokenizer, request).to(model.device)
    plan = plan_for(model, policy, ids.shape[1], request.max_new_tokens)
    known = model.config.model_type in architectures()
    ranks = getattr(model, "_tp_size", None) or 1
    compiled, reason = request.compiles(str(model.device), known, ranks)
    options = sampling(request, tokenizer)
    torch.manual_seed(request.seed)
    with applied(model, policy, compile=compiled, special_tokens=tokenizer, generic=request.generic):
        compiler = patch_of(model).compiler
        if isinstance(compiler, BackgroundCompiler):
            compiler.notify = tell
        cache = cache_for(model, prompt=ids.shape[1], max_new_tokens=request.max_new_tokens)
        referee = Referee(model, ids) if request.compare_dense else None
        with referee or nullcontext():
            watch = Watch(
                tokenizer,
                write,
                cache=cache,
                graphs=lambda: compile_report(model).graphs,
                each=referee.token if referee else None,
            )
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=request.max_new_tokens,
                custom_generate=DecodeLoop(check_every=1, streamer=watch),
                stopping_criteria=[StopWhen(stop)],
                **options,
            )
        watch.residents.note(last=True)
        after, kept = watch.residents.everywhere()
        agreement = referee.verdict() if referee else None
        report = compile_report(model)
    ended = "interrupted" if stop() else "length" if len(watch.tokens) >= request.max_new_tokens else "text"
    return Outcome(
        policy=policy.name,
        digest=policy.digest,
        params={name: param.value.text for name, param in policy.params.items()},
        model=name,
        untested_type=None if known else str(model.config.model_type),
        new_tokens=len(watch.tokens),
        text=tokenizer.decode(watch.tokens, skip_special_tokens=True),
        token_ids=watch.tokens,
        ended=ended,
        can_evict=any(pool.evicts for layer in plan.layers for pool in layer.pools),
        resident_peak=max((tokens for _, tokens in after), default=0),
        residents=after,
        tokens_per_second=watch.tokens_per_second,
        prompt_seconds=watch.prompt_seconds,
        compile_seconds=watch.compile_seconds,
        compile=bool(compiled),
        compile_reason=reason,
        **vars(report),
        **counts(plan, cache, kept),
        ranks=ranks,
        seed=request.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        agreement=agreement,
        versions={
            "kvpolicy": kvpolicy.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def counts(plan: Plan, cache: PolicyCache, kept: dict[str, int]) -> dict[str, Any]:
    """What the plan announced beside what the cache's tensors say, as fields of an Outcome. All ranks must call it."""
    stats = cache.stats(everywhere=True)
    held = cache.ranks.collect((cache.bytes, cache.own.bytes, cache.own.dense_bytes))
    held_bytes, planned, dense = next((each for each in held if each[0] != each[1]), max(held))
    heads = len(plan.layers) * plan.geometry.kv_heads * plan.batch
    slots: dict[str, int] = {}
    for pool in (pool for layer in plan.layers for pool in plan.even(layer).pools):
        slots[pool.name] = max(slots.get(pool.name, 0), pool.capacity)
    pools = {
        name: {
            "kept": kept[name],
            "bound": pool["bound"],
            "peak": pool["peak"],
            "slots": slots[name],
            "seen": pool["seen"],
            "evicted": pool["evicted"],
            "evicted_per_head": pool["evicted"] / heads,
        }
        for name, pool in stats["pools"].items()
    }
    return {
        "prompt_tokens": plan.prompt[1],
        "max_new_tokens": plan.max_new_tokens,
        "evicted": stats["evicted"],
        "held_peak": stats["resident_peak"],
        "resident_bound": plan.resident_bound,
        "slots": max(plan.even(layer).slots for layer in plan.layers),
        "cache_bytes": held_bytes,
        "planned_cache_bytes": planned,
        "dense_cache_bytes": dense,
        "pools": pools,
    }


def plan_for(model: Any, policy: Policy, prompt: int, max_new_tokens: int) -> Plan:
    """The plan of a single row, made before anything is changed or generated.

    Raises:
        ModelError: the text would be longer than the model knows positions.
        UsageError: the policy cannot hold these lengths.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + max_new_tokens > limit:
        raise ModelError(
            f"this model knows {limit} positions, and a prompt of {prompt} tokens with {max_new_tokens} new ones needs "
            f"{prompt + max_new_tokens}; shorten one of them"
        )
    geometry = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
    return make_plan(policy, geometry, prompt=prompt, max_new_tokens=max_new_tokens)


def sampling(request: Request, tokenizer: Any) -> dict[str, Any]:
    """The keywords of ``generate`` that say how tokens are chosen.

    Raises:
        UsageError: top_p without a temperature, which greedy decoding would ignore.
    """
    options: dict[str, Any] = {"do_sample": request.temperature > 0}
    if request.temperature > 0:
        options["temperature"] = request.temperature
    if request.top_p is not None:
        if not request.temperature > 0:
            raise UsageError("--top-p only means something when sampling; add --temperature 1")
        options["top_p"] = request.top_p
    if getattr(tokenizer, "pad_token_id", None) is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options
