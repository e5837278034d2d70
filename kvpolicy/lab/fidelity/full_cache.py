"""What the full cache would say of a text at every place of its output, kept small.

A distribution over the vocabulary is too large to keep for every place of a long output (50,000 numbers each), and the
hidden state that it is made of is not (a few hundred): that is kept, and the output layer is run again, a block of
places at a time, whenever the distribution is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvpolicy.architecture import architectures
from kvpolicy.errors import ModelError, UsageError
from kvpolicy.lab.dataset import Text
from kvpolicy.lab.running import Request, encode
from kvpolicy.patching.checks import decoder_of

AT_ONCE = 1024
"""Tokens that the full cache reads at once."""

PROBE = 8
"""Tokens on which the output layer is checked."""


@dataclass(frozen=True)
class Forced:
    """A text as token ids: the prompt int64 [P], and the output [M] that is forced on the model, M >= 1."""

    number: int
    prompt: Tensor
    output: Tensor

    @property
    def ids(self) -> Tensor:
        """All that the model reads [P + M - 1]: nothing is asked after the last token."""
        return torch.cat([self.prompt, self.output[:-1]])


def force_ids(tokenizer: Any, text: Text, *, most: int | None, chat: bool | None = False) -> Forced:
    """The ids of a text, ``most`` of its output. Prompt and output are read as one where the cut is a cut of tokens.

    Raises:
        UsageError: the prompt or the output has no token.
    """
    prompt = encode(tokenizer, Request(text.prompt, chat=chat))[0]
    output = tokenizer(text.output, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if not (chat and getattr(tokenizer, "chat_template", None)):
        whole = tokenizer(text.prompt + text.output, return_tensors="pt").input_ids[0]
        if torch.equal(whole[: len(prompt)], prompt):
            output = whole[len(prompt) :]
    if not len(output):
        raise UsageError(f"{text.place}: the output has no tokens; what was written goes in 'output'")
    return Forced(text.number, prompt.long(), output[:most].long())


class Head:
    """The output layer of a model: from hidden states [N, D], as ``Body`` gives them, to logits float32 [N, V]."""

    def __init__(self, model: Any) -> None:
        self.layer, config = model.get_output_embeddings(), model.config.get_text_config()
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden).float() * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @torch.no_grad()
    def check(self, model: Any, ids: Tensor) -> None:
        """Hold it against the model itself on a few tokens.

        Raises:
            ModelError: the model does more after its decoder than is known here.
        """
        few = ids[None, :PROBE].to(model.device)
        told = model(few, use_cache=False).logits[0].float().log_softmax(-1)
        here = self(Body(model)(input_ids=few, use_cache=False).logits[0]).log_softmax(-1)
        wide = 1e-3 if model.dtype == torch.float32 else 0.1
        if not torch.allclose(told, here, rtol=0, atol=wide):
            raise ModelError(
                f"{type(model).__name__} does more after its last layer than an output layer, a scale and a cap, and "
                "fidelity would be measured on other numbers than its own"
            )


class Body(nn.Module):
    """A model without its output layer; what it calls logits are the hidden states that go into it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        base = model.base_model
        if base is model:  # Llama 4
            architecture = architectures()[model.config.model_type]
            if architecture.image_token:
                raise ModelError(
                    f"{type(model).__name__} has no base model that reads ids and ends before the output layer, so it "
                    "cannot be led through texts; load its text model (Llama4ForCausalLM)"
                )
            base = decoder_of(model, architecture)
        self.base = base

    def forward(self, logits_to_keep: int = 0, **inputs: Any) -> Any:
        """As the model's; hidden states of all places come back whatever is to be kept, for they are small."""
        return SimpleNamespace(logits=self.base(**inputs).last_hidden_state)


@torch.no_grad()
def full_states(model: Any, text: Forced) -> Tensor:
    """Hidden states [M, D] in the model's dtype: the one at i is asked for the output's token i. The model is not
    patched, or runs as if it were not."""
    body, cache = Body(model), DynamicCache(config=model.config)
    ids, kept = text.ids[None].to(model.device), []
    for start in range(0, ids.shape[1], AT_ONCE):
        states = body(input_ids=ids[:, start : start + AT_ONCE], past_key_values=cache, use_cache=True).logits[0]
        kept.append(states[max(0, len(text.prompt) - 1 - start) :].clone())
    return torch.cat(kept)
