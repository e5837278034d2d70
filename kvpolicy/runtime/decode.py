"""A lean decode loop behind transformers' `custom_generate` door: the same tokens, no wait for the device per token.

`model.generate(**inputs, custom_generate=kvpolicy.decode_loop)` prepares everything as always and then runs the loop
below instead of its own, which asks the device after every token whether to stop, and copies the whole text to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import utils as generation
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutput

from kvpolicy.errors import UsageError
from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.choosing import Choice, sample
from kvpolicy.runtime.stepping import Stepper, is_watched

KEPT = ("scores", "logits", "attentions", "hidden_states")  # what generate returns of every step when asked to
# What comes with a prompt and says nothing of a generated token, which is text; transformers' own list, which older
# versions have not, leaves out what places images in the text.
SEEN = ("pixel_values", "pixel_values_videos", "image_sizes")
PLACING = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
OF_PROMPTS = (*getattr(generation, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", SEEN), *PLACING)


@dataclass(frozen=True)
class DecodeLoop:
    """Greedy decoding and sampling, as `generate` does them.

    check_every: tokens between two looks at which rows have ended; what was decoded past the end is cut off. Where the
        caller keeps the cache, every token: no policy's cache can be rolled back.
    capture: False: generated steps are never captured as CUDA graphs; None: they are, on CUDA.
    streamer: gets the prompt and then the tokens, `check_every` at a time. `generate` does not pass its own `streamer`
        on to a custom loop, so it must be given here.
    """

    check_every: int = 16
    streamer: BaseStreamer | None = None
    capture: bool | None = None

    def __post_init__(self) -> None:
        if self.check_every < 1:
            raise UsageError(f"check_every is {self.check_every}; the loop looks for ended rows every 1 token or more")

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | generation.GenerateDecoderOnlyOutput:
        """Called by `generate`; input_ids int64 [B, N]. Returns what `generate` would.

        Raises:
            UsageError: beams, ranks that must stop together, no cache, no limit, or inputs the loop does not know.
        """
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise _refusal(f"does greedy decoding and sampling, not {mode.value.replace('_', ' ')}")
        if synced_gpus:
            raise _refusal("cannot keep ranks in step (synced_gpus)")
        if not generation_config.use_cache:
            raise _refusal("needs a cache, and use_cache is False")
        if stopping_criteria.max_length is None:
            raise _refusal("allocates the text in full and needs max_new_tokens")
        run = _Run(self, model, input_ids, logits_processor, stopping_criteria, generation_config)
        return run.decode(model_kwargs)


decode_loop = DecodeLoop()
"""The loop with its defaults: `model.generate(**inputs, custom_generate=kvpolicy.decode_loop)`."""


def _refusal(reason: str) -> UsageError:
    return UsageError(f"the lean decode loop {reason}; call generate without custom_generate")


class _Run:
    """One call: text [B, L] preallocated to its full length, and what the stock loop would keep of every step.

    `alive` [L + 1] says of each length whether any row went on from there; the host reads it once in a while.
    """

    def __init__(
        self,
        loop: DecodeLoop,
        model: Any,
        input_ids: Tensor,
        processor: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.model, self.config, self.streamer, self.capture = model, config, loop.streamer, loop.capture
        self.processor: Any = processor
        self.criteria: Any = criteria
        rows, self.start = input_ids.shape
        self.limit = max(criteria.max_length or 0, self.start + 1)
        self.text = input_ids.new_empty(rows, self.limit)
        self.text[:, : self.start] = input_ids
        self.length = self.looked = self.start
        self.unfinished = torch.ones(rows, dtype=torch.long, device=input_ids.device)
        self.alive = torch.ones(self.limit + 1, dtype=torch.bool, device=input_ids.device)
        self.pad = config._pad_token_tensor if any(hasattr(each, "eos_token_id") for each in criteria) else None
        self.may_stop_early = any(not isinstance(each, MaxLengthCriteria) for each in criteria)
        self.check_every = loop.check_every if self.may_stop_early or loop.streamer else self.limit
        kept = [name for name in KEPT if config.return_dict_in_generate and getattr(config, f"output_{name}", False)]
        self.kept: dict[str, list[Any]] = {name: [] for name in kept}

    def decode(self, kwargs: dict[str, Any]) -> Tensor | generation.GenerateDecoderOnlyOutput:
        """Prompt, then token by token until every row has ended."""
        inputs = _StepInputs(kwargs, self.text, self.start)
        if self.streamer is not None:
            self.streamer.put(self.text[:, : self.start].cpu())
        outputs = self.model._prefill(self.text[:, : self.start], self.config, kwargs)
        cache = outputs.past_key_values
        exposed = self.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        if self.may_stop_early and (exposed or not isinstance(cache, PolicyCache)):
            self.check_every = 1  # the caller sees the cache: nothing may enter that the stock loop would not decode
        self._select(outputs)
        if isinstance(cache, PolicyCache) and not {"attentions", "hidden_states"} & self.kept.keys():
            self._step(cache, inputs, outputs, exposed)
        else:
            while not self._ended():
                outputs = self.model(**inputs.next(self.length), past_key_values=cache, return_dict=True)
                self._select(outputs)
        if self.streamer is not None:
            self.streamer.end()
        return self._result(cache)

    def _step(self, cache: PolicyCache, inputs: _StepInputs, prompt: Any, exposed: bool) -> None:
        """Token by token through a stepper, which goes back with its cache where nobody else can have that."""
        loan = cache.loan
        stepper = loan.take_stepper(self.model, cache) if loan is not None else Stepper(self.model, cache)
        stepper.may_record = self.capture is not False and not is_watched(self.model)
        keep = False
        try:
            self._run_steps(stepper, inputs, prompt)
            keep = loan is not None and not exposed
        finally:
            if keep:
                loan.give_back(stepper)
            else:
                stepper.close()

    def _run_steps(self, stepper: Stepper, inputs: _StepInputs, prompt: Any) -> None:
        """Steps choose their tokens as well where logits are all that it takes."""
        logits = prompt.logits[:, -1]
        choice = None if self.kept else Choice.of(self.processor, self.criteria, self.config, logits)
        position = None if inputs.position is None else inputs.position + 1
        stepper.start(self.text[:, self.length - 1 : self.length], position, self.unfinished)
        while not self._ended():
            if choice is not None:
                stepper.advance(choice, **inputs.fixed)
                self._take(stepper)
            else:
                logits = stepper.step(self.text[:, self.length - 1 : self.length], **inputs.fixed)
                self._select(CausalLMOutput(logits=logits[:, None]))

    def _take(self, stepper: Stepper) -> None:
        """Write down what a step chose."""
        self.text[:, self.length] = stepper.tokens[:, 0]
        self.length += 1
        if self.may_stop_early:
            self.alive[self.length] = stepper.alive

    def _select(self, outputs: Any) -> None:
        """Choose the next token of every row, as the stock loop does, and write it into the text."""
        text = self.text[:, : self.length]
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=text.device)
        scores: Tensor = self.processor(text, logits)
        available = {"scores": scores, "logits": logits}
        for name, kept in self.kept.items():
            kept.append(available[name] if name in available else getattr(outputs, name))
        tokens = sample(scores) if self.config.do_sample else scores.argmax(-1)
        if self.pad is not None:
            tokens = tokens * self.unfinished + self.pad * (1 - self.unfinished)
        self.text[:, self.length] = tokens
        self.length += 1
        scored = tuple(self.kept["scores"]) if "scores" in self.kept else None
        self.unfinished = self.unfinished & ~self.criteria(self.text[:, : self.length], scored)
        self.alive[self.length] = self.unfinished.any()

    def _ended(self) -> bool:
        """Whether to stop; looks at the device once in `check_every` tokens, and cuts off what was decoded too much."""
        ended = self.length >= self.limit
        if not ended and self.length - self.looked < self.check_every:
            return False
        alive = self.alive[self.looked + 1 : self.length + 1].tolist()
        if False in alive:
            ended, self.length = True, self.looked + 1 + alive.index(False)
        if self.streamer is not None:
            for column in self.text[:, self.looked : self.length].cpu().T:
                self.streamer.put(column)
        self.looked = self.length
        return ended

    def _result(self, cache: Cache | None) -> Any:
        text = self.text[:, : self.length].clone()
        if not self.config.return_dict_in_generate:
            return text
        kept: dict[str, Any] = {name: tuple(each[: self.length - self.start]) for name, each in self.kept.items()}
        return generation.GenerateDecoderOnlyOutput(sequences=text, past_key_values=cache, **kept)


class _StepInputs:
    """The model's inputs for each generated token, made on the device without growing anything.

    Raises:
        UsageError: an input that would have to grow with the text in a way that this loop does not know.
    """

    def __init__(self, kwargs: dict[str, Any], text: Tensor, start: int) -> None:
        known = ("position_ids", "attention_mask", "inputs_embeds", "past_key_values", *OF_PROMPTS)
        self.fixed = {name: value for name, value in kwargs.items() if name not in known}
        strange = [name for name, value in self.fixed.items() if isinstance(value, Tensor)]
        if strange:
            raise _refusal(f"does not know how {', '.join(strange)} would go on")
        self.text = text
        positions: Tensor | None = kwargs.get("position_ids")
        self.position: Tensor | None = None
        if positions is not None:  # [..., rows, 1]: some models count a token's place along several axes
            self.position = positions[..., -1:].expand(*positions.shape[:-2], text.shape[0], 1).clone()
        mask: Tensor | None = kwargs.get("attention_mask")
        self.mask: Tensor | None = None
        if mask is not None and not isinstance(kwargs.get("past_key_values"), PolicyCache):
            # As long as the whole text, which may be more than the ids that were passed.
            self.ahead = mask.shape[1] - start
            self.mask = mask.new_ones(mask.shape[0], text.shape[1] + self.ahead)
            self.mask[:, : mask.shape[1]] = mask

    def next(self, length: int) -> dict[str, Any]:
        """Inputs for the token at column `length - 1`, its strides those of a fresh tensor."""
        token = self.text[:, length - 1 : length].clone(memory_format=torch.contiguous_format)
        inputs = {**self.fixed, "input_ids": token}
        if self.position is not None:
            self.position += 1
            inputs["position_ids"] = self.position
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[:, : length + self.ahead]
        return inputs
