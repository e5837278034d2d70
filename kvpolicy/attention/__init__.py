"""Attention over slots, and the signals it hands out. One small interface; ``torch`` defines what is right."""

from kvpolicy.attention.columns import newest_queries, prompt_scores, reduce_heads
from kvpolicy.attention.paged import attend_pages
from kvpolicy.attention.parts import attend_part, merge_parts
from kvpolicy.attention.rotation import Rotation, turn
from kvpolicy.attention.shared import attend_shared, mix_shared, shared_logits
from kvpolicy.attention.torch_backend import attend_slots, scaled_logits
from kvpolicy.attention.torch_prompt import Reduce, attend_prompt, attend_prompt_and_sum, column_sums

__all__ = [
    "Reduce",
    "Rotation",
    "attend_pages",
    "attend_part",
    "attend_prompt",
    "attend_prompt_and_sum",
    "attend_shared",
    "attend_slots",
    "column_sums",
    "merge_parts",
    "mix_shared",
    "newest_queries",
    "prompt_scores",
    "reduce_heads",
    "scaled_logits",
    "shared_logits",
    "turn",
]
