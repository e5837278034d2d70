"""A lean decode loop behind transformers' `custom_generate` door: the same tokens, no wait for the device per token.

`model.generate(**inputs, custom_generate=kvpolicy.decode_loop)` prepares everything as always and then runs the loop
below instead of its own, which asks the device after every token whether to stop, and copies the whole text to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    MaxLengthCriteria,
)
from transformers.generation.streamers import BaseStreamer

from kvpolicy.errors import UsageError


@dataclass(frozen=True)
class DecodeLoop:
    """Greedy decoding and sampling, as `generate` does them.

    check_every: tokens between two looks at which rows have ended; what was decoded past the end is cut off.
    streamer: gets the prompt and then the tokens, `check_every` at a time. `generate` does not pass its own `streamer`
        on to a custom loop, so it must be given here.
    """

    check_every: int = 16
    streamer: BaseStreamer | None = None

    def __post_init__(self) -> None:
        if self.check_every < 1:
            raise UsageError(
                f"check_every is {self.check_every}; the loop must look for ended rows every 1 token or more"
            )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Called by `generate`; input_ids int64 [B, N]. Returns what `generate` would.

        Raises:
            UsageError: beams, assisted decoding, or ranks that must stop together.
        """
        _refuse(generation_config, synced_gpus)
        run = _Run(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        return run.decode()


decode_loop = DecodeLoop()
"""The loop with its defaults: `model.generate(**inputs, custom_generate=kvpolicy.decode_loop)`."""


def _refuse(generation_config: GenerationConfig, synced_gpus: bool) -> None:
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UsageError(
            f"the lean decode loop does greedy decoding and sampling, not {mode.value.replace('_', ' ')}; call "
            "generate without custom_generate"
        )
    if synced_gpus:
        raise UsageError(
            "the lean decode loop cannot keep ranks in step (synced_gpus); generate without custom_generate"
        )


class _Run:
    """One call: text [B, L] preallocated to its full length, and what the stock loop would keep of every step."""

    def __init__(
        self,
        loop: DecodeLoop,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.config, self.kwargs = model, config, model_kwargs
        self.processor, self.criteria, self.streamer = logits_processor, stopping_criteria, loop.streamer
        rows, self.start = input_ids.shape
        self.limit = stopping_criteria.max_length
        if self.limit is None:
            raise UsageError(
                "the lean decode loop allocates the text in full: give generate max_new_tokens or max_length"
            )
        self.text = input_ids.new_empty(rows, max(self.limit, self.start + 1))
        self.text[:, : self.start] = input_ids
        self.length = self.start
        self.unfinished = torch.ones(rows, dtype=torch.long, device=input_ids.device)
        self.alive = torch.ones(self.text.shape[1] + 1, dtype=torch.bool, device=input_ids.device)
        self.looked = self.start
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.check_every = loop.check_every if self._may_stop_early() else self.text.shape[1]
        self.kept: dict[str, list[Any]] = {name: [] for name in self._wanted()}

    def _may_stop_early(self) -> bool:
        return any(not isinstance(criterion, MaxLengthCriteria) for criterion in self.criteria)

    def _wanted(self) -> list[str]:
        config = self.config
        if not config.return_dict_in_generate:
            return []
        wanted = {
            "scores": config.output_scores,
            "logits": config.output_logits,
            "attentions": config.output_attentions,
            "hidden_states": config.output_hidden_states,
        }
        return [name for name, asked in wanted.items() if asked]

    def decode(self) -> Tensor | GenerateDecoderOnlyOutput:
        """Prompt, then token by token until every row has ended."""
        if self.streamer is not None:
            self.streamer.put(self.text[:, : self.start].cpu())
        outputs = self.model._prefill(self.text[:, : self.start], self.config, self.kwargs)
        inputs = _StepInputs(self.kwargs, outputs.past_key_values, self.text, self.start)
        check_every = 1 if self._outlives(outputs.past_key_values) else self.check_every
        self._select(outputs)
        while not self._ended(check_every):
            outputs = self.model(**inputs.next(self.length), return_dict=True)
            self._select(outputs)
        if self.streamer is not None:
            self.streamer.end()
        return self._result(outputs.past_key_values)

    def _outlives(self, cache: Cache | None) -> bool:
        """Whether the caller can see the cache afterwards: then no token may enter it that the stock loop would not
        have decoded, as a policy's cache cannot be rolled back."""
        return self._may_stop_early() and bool(
            self.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        )

    def _select(self, outputs: Any) -> None:
        """Choose the next token of every row, as the stock loop does, and write it into the text."""
        text = self.text[:, : self.length]
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=text.device)
        scores = self.processor(text, logits)
        available = {"scores": scores, "logits": logits}
        for name, kept in self.kept.items():
            kept.append(available[name] if name in available else getattr(outputs, name))
        tokens = _sample(scores) if self.config.do_sample else scores.argmax(-1)
        if self.pads:
            tokens = tokens * self.unfinished + self.config._pad_token_tensor * (1 - self.unfinished)
        self.text[:, self.length] = tokens
        self.length += 1
        ended = self.criteria(
            self.text[:, : self.length], tuple(self.kept["scores"]) if "scores" in self.kept else None
        )
        self.unfinished = self.unfinished & ~ended
        self.alive[self.length] = self.unfinished.any()

    def _ended(self, check_every: int) -> bool:
        """Whether to stop; looks at the device once in `check_every` tokens, and cuts off what was decoded too much."""
        full = self.length >= self.limit
        if not full and self.length - self.looked < check_every:
            return False
        alive = self.alive[self.looked + 1 : self.length + 1].tolist()
        ended = full
        if False in alive:
            ended, self.length = True, self.looked + 1 + alive.index(False)
        if self.streamer is not None:
            for column in self.text[:, self.looked : self.length].cpu().T:
                self.streamer.put(column)
        self.looked = self.length
        return ended

    def _result(self, cache: Cache | None) -> Tensor | GenerateDecoderOnlyOutput:
        text = self.text[:, : self.length].clone()
        if not self.config.return_dict_in_generate:
            return text
        steps = self.length - self.start
        kept = {name: tuple(values[:steps]) for name, values in self.kept.items()}
        return GenerateDecoderOnlyOutput(sequences=text, past_key_values=cache, **kept)


class _StepInputs:
    """The model's inputs for each generated token, made on the device without growing anything."""

    def __init__(self, kwargs: dict[str, Any], cache: Cache | None, text: Tensor, start: int) -> None:
        positions: Tensor | None = kwargs.pop("position_ids", None)
        mask: Tensor | None = kwargs.pop("attention_mask", None)
        kwargs.pop("inputs_embeds", None)
        kwargs.pop("past_key_values", None)
        self.fixed = {**kwargs, "past_key_values": cache}
        self.text = text
        self.position = None if positions is None else positions[..., -1:].expand(text.shape[0], -1).clone()
        self.mask: Tensor | None = None
        if mask is not None:  # as long as the whole text, which may be more than the ids that were passed
            self.mask = mask.new_ones(mask.shape[0], mask.shape[1] + text.shape[1] - start)
            self.mask[:, : mask.shape[1]] = mask
            self.ahead = mask.shape[1] - start

    def next(self, length: int) -> dict[str, Any]:
        """Inputs for the token at column `length - 1`, its strides those of a fresh tensor."""
        token = self.text[:, length - 1 : length].clone(memory_format=torch.contiguous_format)
        inputs = {"input_ids": token, **self.fixed}
        if self.position is not None:
            self.position += 1
            inputs["position_ids"] = self.position
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[:, : length + self.ahead]
        return inputs


def _sample(scores: Tensor) -> Tensor:
    """One draw per row [B] from scores [B, V]: the numbers of `torch.multinomial`, without its look at the device.

    multinomial divides by exponential noise and takes the largest; it also asks the host whether the weights are sane.
    """
    weights = nn.functional.softmax(scores, dim=-1)
    return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)
