"""One prompt through one model under one policy: the text, what was kept of it, and how that compares.

``kvpolicy apply`` prints what this returns.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from kvpolicy.errors import ModelError, UsageError
from kvpolicy.language import Policy
from kvpolicy.patching import applied, compile_report
from kvpolicy.plan import ModelGeometry, Plan, make_plan

Write = Callable[[str], None]


@dataclass
class Outcome:
    """What one run gave. Bytes are of the cache; ``resident_peak`` and ``resident_bound`` are tokens per layer, row and
    KV head; ``tokens_per_second`` leaves the prompt and the compilation of the steps out."""

    policy: str
    digest: str
    model: str
    prompt_tokens: int
    new_tokens: int
    text: str
    token_ids: list[int]
    evicted: int
    resident_peak: int
    resident_bound: int
    cache_bytes: int
    planned_cache_bytes: int
    dense_cache_bytes: int
    tokens_per_second: float
    prompt_seconds: float
    compile: bool
    graphs: int
    graph_breaks: int
    recompiles: int
    interrupted: bool
    pools: dict[str, dict[str, int]]
    seed: int
    dtype: str
    device: str
    agreement: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What to run. ``compile`` None: on CUDA only. ``temperature`` 0: greedy."""

    prompt: str
    max_new_tokens: int = 256
    compile: bool | None = None
    chat: bool | None = None
    temperature: float = 0.0
    seed: int = 0


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
    model: Any, tokenizer: Any, name: str, policy: Policy, request: Request, write: Write = lambda text: None
) -> Outcome:
    """Generate under a policy and account for it. The model is as before afterwards.

    Args:
        name: what the model is called in the outcome.
        write: gets the text piece by piece.

    Raises:
        UsageError, ModelError: the run cannot be made; nothing was generated.
    """
    ids = encode(tokenizer, request).to(model.device)
    plan = plan_for(model, policy, ids.shape[1], request.max_new_tokens)
    torch.manual_seed(request.seed)
    streamer = Pieces(tokenizer, write)
    timer = Timer(streamer)
    interrupted = False
    with applied(model, policy, compile=request.compile):
        from kvpolicy.patching import cache_for

        cache = cache_for(model, prompt=ids.shape[1], max_new_tokens=request.max_new_tokens)
        compiled = model.device.type == "cuda" if request.compile is None else request.compile
        try:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=request.max_new_tokens,
                streamer=timer,
                **sampling(request, tokenizer),
            )
        except KeyboardInterrupt:
            interrupted = True
        report = compile_report(model)
    stats = cache.stats()
    return Outcome(
        policy=policy.name,
        digest=policy.digest,
        model=name,
        prompt_tokens=ids.shape[1],
        new_tokens=len(timer.tokens),
        text=streamer.text,
        token_ids=timer.tokens,
        evicted=stats["evicted"],
        resident_peak=stats["resident_peak"],
        resident_bound=plan.resident_bound,
        cache_bytes=cache.bytes,
        planned_cache_bytes=plan.bytes,
        dense_cache_bytes=plan.dense_bytes,
        tokens_per_second=timer.rate(skip=8 if compiled else 1),
        prompt_seconds=timer.prompt_seconds,
        compile=bool(compiled),
        **vars(report),
        interrupted=interrupted,
        pools=stats["pools"],
        seed=request.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def plan_for(model: Any, policy: Policy, prompt: int, max_new_tokens: int) -> Plan:
    """The plan of a single row, made before anything is changed or generated."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and prompt + max_new_tokens > limit:
        raise ModelError(
            f"this model knows {limit} positions, and a prompt of {prompt} tokens with {max_new_tokens} new ones needs "
            f"{prompt + max_new_tokens}; shorten one of them"
        )
    geometry = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
    return make_plan(policy, geometry, prompt=prompt, max_new_tokens=max_new_tokens)


def sampling(request: Request, tokenizer: Any) -> dict[str, Any]:
    """The keywords of ``generate`` that say how tokens are chosen."""
    options: dict[str, Any] = {"do_sample": request.temperature > 0}
    if request.temperature > 0:
        options["temperature"] = request.temperature
    if getattr(tokenizer, "pad_token_id", None) is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return options


@torch.no_grad()
def compare_dense(model: Any, tokenizer: Any, request: Request, outcome: Outcome) -> dict[str, float]:
    """How the full cache would have continued, given the very tokens that the policy wrote (teacher forcing).

    Returns ``top1``, the share of the new tokens that are the full cache's own first choice, and
    ``mean_log_probability`` of them under the full cache (natural logarithm). Greedy under ``dense``, top1 is 1.
    """
    ids = encode(tokenizer, request).to(model.device)
    new = torch.tensor([outcome.token_ids], device=model.device)
    logits = (
        model(torch.cat([ids, new], dim=1), use_cache=False, logits_to_keep=new.shape[1] + 1).logits[0, :-1].float()
    )
    chosen = new[0]
    log_probabilities = logits.log_softmax(-1).gather(-1, chosen[:, None])
    return {
        "top1": float((logits.argmax(-1) == chosen).float().mean()),
        "mean_log_probability": float(log_probabilities.mean()),
    }


class Timer:
    """A streamer that notes when each token came, and hands it on. The first thing it is put is the prompt."""

    def __init__(self, then: Pieces) -> None:
        self.then = then
        self.started = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.times.append(time.perf_counter())
        self.tokens.extend(value.flatten().tolist())
        self.then.add(self.tokens)

    def end(self) -> None:
        self.then.finish(self.tokens)

    @property
    def prompt_seconds(self) -> float:
        """Until the first token."""
        return self.times[0] - self.started if self.times else 0.0

    def rate(self, skip: int) -> float:
        """Tokens per second after the first ``skip``, which may have waited for a compiler."""
        times = self.times[min(skip, max(0, len(self.times) - 2)) :]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0


class Pieces:
    """Text of the tokens so far, written piece by piece; a word is held back until it is certain."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.text = ""

    def add(self, tokens: list[int]) -> None:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        certain = text.rfind(" ") + 1 if not text.endswith("\n") else len(text)
        if certain > len(self.text) and text.startswith(self.text):
            self.write(text[len(self.text) : certain])
            self.text = text[:certain]

    def finish(self, tokens: list[int]) -> None:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.write(text[len(self.text) :])
        self.text = text
