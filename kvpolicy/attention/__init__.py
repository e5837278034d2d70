"""Attention over slots, and the signals it hands out. One small interface; ``torch`` defines what is right."""

from kvpolicy.attention.columns import newest_queries, prompt_scores, reduce_heads
from kvpolicy.attention.formula import Formula, sink_softmax
from kvpolicy.attention.local import attend_visible
from kvpolicy.attention.paged import attend_pages
from kvpolicy.attention.parts import attend_part, merge_parts, sink_part
from kvpolicy.attention.rotation import Rotation, turn
from kvpolicy.attention.shared import attend_shared, mix_shared, shared_logits
from kvpolicy.attention.torch_backend import attend_slots, attention_probabilities, scaled_logits
from kvpolicy.attention.torch_prompt import Reduce, attend_prompt, attend_prompt_and_sum, column_sums

__all__ = [
    "Formula",
    "Reduce",
    "Rotation",
    "attend_pages",
    "attend_part",
    "attend_prompt",
    "attend_prompt_and_sum",
    "attend_shared",
    "attend_slots",
    "attend_visible",
    "attention_probabilities",
    "column_sums",
    "merge_parts",
    "mix_shared",
    "newest_queries",
    "prompt_scores",
    "reduce_heads",
    "scaled_logits",
    "shared_logits",
    "sink_part",
    "sink_softmax",
    "turn",
]
