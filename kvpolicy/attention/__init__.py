"""Attention over slots, and the signals it hands out. One small interface; ``torch`` defines what is right."""

from kvpolicy.attention.torch_backend import attend_prompt, attend_slots, column_sums, scaled_logits

__all__ = ["attend_prompt", "attend_slots", "column_sums", "scaled_logits"]
