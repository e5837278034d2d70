"""Make `builtin:tiny`: python -m kvpolicy.models.tiny.train [FOLDER]. A few minutes on two cores; the seed is fixed.

A two-layer Llama learns to continue a phrase it heard once: the smallest task whose answer depends on single tokens far
back. The phrase lies at a random place, so that nothing but its content tells what comes next; phrases and texts grow
longer as it learns.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.models.tiny.task import HUM, SPECIALS, VOCABULARY, WORDS
from kvpolicy.models.training import Lesson, fixed_tokenizer, train

STEPS = 700
LEARNING_RATE = 2e-3
LEAST = 6
HUM_ID = VOCABULARY.index(HUM)
FIRST_WORD = HUM_ID + 1
BOS_ID = SPECIALS.index("<bos>")


def make_config() -> LlamaConfig:
    """178,656 parameters; positions far beyond the training's, so that long runs stay finite."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        pad_token_id=SPECIALS.index("<pad>"),
        bos_token_id=BOS_ID,
        eos_token_id=None,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word."""
    return fixed_tokenizer(VOCABULARY, WhitespaceSplit())


def make_batch(generator: torch.Generator, most: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts [B, length] and what to predict, -100 where nothing is: every word from the phrase's return on.

    Phrases have from LEAST to ``most`` words: a model that meets one length alone at the end forgets the others.
    """
    rows = 96 if length < 128 else 48
    ids = torch.full((rows, length), HUM_ID)
    labels = torch.full((rows, length), -100)
    for row in range(rows):
        words = int(torch.randint(LEAST, most + 1, (1,), generator=generator))
        phrase = torch.randperm(len(WORDS), generator=generator)[:words] + FIRST_WORD
        first = int(torch.randint(1, length - 2 * words + 1, (1,), generator=generator))
        again = int(torch.randint(first + words, length - words + 1, (1,), generator=generator))
        ids[row, first : first + words] = phrase
        ids[row, again:] = phrase.repeat(length // words + 1)[: length - again]
        labels[row, again + 1 :] = ids[row, again + 1 :]
    ids[:, 0] = BOS_ID
    return ids, labels


def schedule(step: int) -> tuple[int, int, float]:
    """Most words of a phrase, length of a text, and learning rate at a step."""
    done = step / STEPS
    words = 8 + int(8 * min(1.0, 1.3 * done))
    length = 24 + int(16 * done / 0.3) if done < 0.3 else 40 + int(232 * (done - 0.3) / 0.7)
    cooling = 1.0 if done < 0.7 else 1.0 - 0.95 * (done - 0.7) / 0.3
    return words, max(length, 2 * words + 2), LEARNING_RATE * min(1.0, (step + 1) / 50) * cooling


def main() -> None:
    """Train, and write model and tokenizer to a folder (default: this one)."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def lesson(step: int, right: float) -> Lesson | None:
        if step == STEPS:
            return None
        words, length, rate = schedule(step)
        return Lesson(*make_batch(generator, words, length), rate, f"up to {words} words in {length}")

    model = LlamaForCausalLM(make_config())
    train(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01), lesson)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
