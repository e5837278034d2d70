"""What the scripts that made the built-in models share: a tokenizer over a fixed vocabulary, and the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Lesson:
    """One step of training: texts [B, T], labels [B, T] that are -100 where nothing is asked, the learning rate, and
    ``about``, how far the schooling has come."""

    ids: Tensor
    labels: Tensor
    rate: float
    about: str


def fixed_tokenizer(vocabulary: Sequence[str], splitter: Any, decoder: Any = None) -> PreTrainedTokenizerFast:
    """One id for each word that ``splitter`` finds, in the order of the vocabulary; `<bos>` in front.

    decoder: puts the words of an answer together; None: with a space between them.
    """
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, lesson: Callable[[int, float], Lesson | None]
) -> LlamaForCausalLM:
    """Train until there is no more lesson; prints the loss and how many tokens are predicted right.

    Args:
        lesson: (step, share of the last lesson's tokens that were right) -> the next one, or None at the end.
    """
    started, step, right = time.monotonic(), 0, 0.0
    while (now := lesson(step, right)) is not None:
        for group in optimizer.param_groups:
            group["lr"] = now.rate
        asked = now.labels[:, 1:] != -100
        states = model.model(input_ids=now.ids, use_cache=False).last_hidden_state[:, :-1]
        logits, wanted = model.lm_head(states[asked]), now.labels[:, 1:][asked]
        loss = nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right, step = float((logits.argmax(-1) == wanted).float().mean()), step + 1
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}: {now.about}, loss {loss.item():.3f}, right {right:.4f}, {seconds:.0f} s", flush=True)
    return model.eval()
