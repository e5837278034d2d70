"""Attention over slots, and the signals it hands out. One small interface; ``torch`` defines what is right."""

from kvpolicy.attention.columns import prompt_scores, reduce_heads, window_scores
from kvpolicy.attention.torch_backend import attend_slots, scaled_logits
from kvpolicy.attention.torch_prompt import attend_prompt, attend_prompt_and_sum, column_sums

__all__ = [
    "attend_prompt",
    "attend_prompt_and_sum",
    "attend_slots",
    "column_sums",
    "prompt_scores",
    "reduce_heads",
    "scaled_logits",
    "window_scores",
]
