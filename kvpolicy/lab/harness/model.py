"""The model type ``kvpolicy`` of lm-evaluation-harness: a model of transformers whose cache is a policy's.

What is generated goes through ``generate`` as always. What is scored is led through the cache: the context as a prompt,
then the continuation token by token, as if the model wrote it. The first of these steps is fed the context's last
token: without it, the first token of every answer, which may be all of it, would be read off the prompt pass, that no
policy touches.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from kvpolicy.errors import UsageError
from kvpolicy.lab.bench.budgets import with_budget
from kvpolicy.lab.fidelity.forcing import Lead, takes_layers
from kvpolicy.lab.fidelity.full_cache import Forced
from kvpolicy.lab.watching import kept_by_row
from kvpolicy.language import Policy, load_policy
from kvpolicy.models import load_model
from kvpolicy.patching import apply, cache_for
from kvpolicy.plan import ModelGeometry
from kvpolicy.runtime import PolicyCache

LOGGER = logging.getLogger(__name__)

LONG = 8
"""A policy without a ``budget`` of its own is given one for a prompt, and an output, of so many times that."""

AT_ONCE = 16
"""Places of a continuation whose logits are held at once."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context, continuation) as text, None for a part of a longer one; and the ids of both."""


@dataclass(frozen=True)
class Asked:
    """A continuation as it is led through; the output's first ``skip`` tokens are the context's, and not scored."""

    text: Forced
    skip: int


@register_model("kvpolicy")
class PolicyLM(HFLM):
    """A model under a policy, or as it is where none is named.

    Args:
        pretrained: as ``kvpolicy.models.load_model`` takes it: builtin:smollm2, a folder, a hub id, a .gguf file.
        policy: a YAML file, or the name of a shipped one.
        budget: tokens to hold, where the policy has no param of that name.
        compile: whether generated steps are compiled.
        given: params of the policy, and arguments of the harness's own ``hf`` model.

    Raises:
        KvpolicyError: there is no such model, policy or param, or the two do not fit.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        budget: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        compile: bool = False,
        **given: Any,
    ) -> None:
        theirs = {name: given.pop(name) for name in list(given) if name in inspect.signature(HFLM).parameters}
        if policy is None and (given or budget is not None):
            raise UsageError(f"{', '.join(given) or 'budget'} is set, and no policy; add policy=NAME to --model_args")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's own default, which says nothing of what the user wants
        model, tokenizer = load_model(pretrained, device=device, dtype=None if dtype == "auto" else dtype)
        super().__init__(pretrained=model, tokenizer=tokenizer, **theirs)
        self.name, self.policy = pretrained, None if policy is None else _bound(model, policy, budget, given)
        self.evicted = self.texts = self.untouched = 0
        if self.policy is not None:
            apply(model, self.policy, compile=compile, special_tokens=tokenizer)

    @property
    def eot_token_id(self) -> int:
        """What ends a text; its padding where a model has no such token, and never ends by itself."""
        ends = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id or 0) if ends is None else int(ends)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **more: Any) -> Any:
        """As the harness does it, on a cache of ours that can be asked afterwards what it did."""
        if self.policy is None:
            return super()._model_generate(context, max_length, stop, **more)
        mask = more.get("attention_mask")
        lengths = [context.shape[1]] * len(context) if mask is None else mask.sum(-1).tolist()
        new = max_length - context.shape[1]
        cache = cache_for(self.model, prompt=(min(lengths), max(lengths)), max_new_tokens=new, batch=len(lengths))
        text = super()._model_generate(context, max_length, stop, past_key_values=cache, **more)
        self._note(cache)
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each continuation its log likelihood, in nats, and whether the model would write just that."""
        if self.policy is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        asked = [self._asked(number, context, after) for number, (_, context, after) in enumerate(requests)]
        groups: dict[int, list[Asked]] = defaultdict(list)
        for each in asked:  # of one length, so that no step is spent on rows that have ended
            groups[len(each.text.output)].append(each)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        batches = [
            group[start : start + size] for _, group in sorted(groups.items()) for start in range(0, len(group), size)
        ]
        found: dict[int, tuple[float, bool]] = {}
        for batch in tqdm(batches, disable=disable_tqdm, desc="Running loglikelihood requests"):
            found |= self._led(batch)
        for number, (said, _, _) in enumerate(requests):
            if said is not None:
                self.cache_hook.add_partial("loglikelihood", said, found[number])
        return [found[number] for number in range(len(requests))]

    def _asked(self, number: int, context: Sequence[int], after: Sequence[int]) -> Asked:
        """The context but for its last token, which begins what goes through generated steps."""
        more = len(context) + len(after) - self.max_length
        if more > 0:
            LOGGER.warning("a context was cut on the left: with its continuation it passes %d", self.max_length)
            context = context[more:]
        if not context:
            raise UsageError(f"a continuation of {len(after)} tokens leaves no room for any context; shorten it")
        cut = max(1, len(context) - 1)
        text = Forced(number, torch.tensor(context[:cut]), torch.tensor([*context[cut:], *after]))
        return Asked(text, len(context) - cut)

    @torch.no_grad()
    def _led(self, batch: Sequence[Asked]) -> dict[int, tuple[float, bool]]:
        """By number, what comes of texts whose outputs are of one length."""
        texts = [each.text for each in batch]
        prompts = [len(text.prompt) for text in texts]
        steps = len(texts[0].output)
        cache = cache_for(self.model, prompt=(min(prompts), max(prompts)), max_new_tokens=steps, batch=len(texts))
        tokens = torch.stack([text.output for text in texts]).to(self.device)
        scores, equal = [], []
        by_layer = takes_layers(cache.device, cache.plan.geometry)
        lead = Lead(self.model, cache, texts, by_layer=by_layer)
        for place, logits in lead.run(AT_ONCE):
            said, token = logits.float().log_softmax(-1), tokens[:, place : place + logits.shape[1]]
            scores.append(said.gather(-1, token[..., None])[..., 0])
            equal.append(said.argmax(-1) == token)
        self._note(cache)
        score, greedy = torch.cat(scores, 1), torch.cat(equal, 1)
        return {
            each.text.number: (float(score[row, each.skip :].sum()), bool(greedy[row, each.skip :].all()))
            for row, each in enumerate(batch)
        }

    def _note(self, cache: PolicyCache) -> None:
        """Remember what the policy did to some texts."""
        evicted, _ = kept_by_row(cache)
        self.evicted += sum(evicted)
        self.texts += len(evicted)
        self.untouched += evicted.count(0)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results; the model is local, so nothing is asked of the hub."""
        told: dict[str, Any] = {
            "pretrained": self.name,
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
        }
        if self.policy is not None:
            if not self.evicted:
                LOGGER.warning("%s evicted nothing in %s texts", self.policy.name, self.texts)
            told["kvpolicy"] = {
                "policy": self.policy.name,
                "digest": self.policy.digest,
                "params": {name: param.value.text for name, param in self.policy.params.items()},
                "evicted": self.evicted,
                "texts": self.texts,
                "texts_without_eviction": self.untouched,
            }
        return told


def _bound(model: Any, spec: str, budget: int | None, params: dict[str, Any]) -> Policy:
    """The policy with its params and its budget."""
    policy = load_policy(spec)
    given = {name: str(value) for name, value in params.items()}
    if budget is None or "budget" in policy.params:
        given |= {} if budget is None else {"budget": str(budget)}
        return policy.bind(**given) if given else policy
    shape = ModelGeometry.from_config(model.config, str(model.dtype).removeprefix("torch."))
    long = LONG * int(budget)
    return with_budget(policy, int(budget), shape, prompt=long, max_new_tokens=long, given=given).policy
