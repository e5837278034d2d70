"""How a policy's run compares with the full cache on the same text (teacher forcing).

The full cache reads what the policy wrote, so both answer the same question at every step: what comes next? Were each
to write its own text, two different stories would be compared after the first difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

TOGETHER = 64
"""Tokens that the full cache reads at once: their logits are all that is kept."""


class Referee:
    """Reads along with a run and keeps score; a context manager that listens to the model while it is open.

    model: the patched model itself: over a cache that is not a policy's it behaves as if it were not patched.
    ids: the prompt [1, N].
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.unread = ids
        self.heard: Tensor | None = None
        self.waiting: list[tuple[Tensor, int]] = []
        self.same = self.chosen = 0
        self.kl: list[float] = []
        self.log_probabilities: list[float] = []
        self.first_divergence: int | None = None
        self.asking = False

    def __enter__(self) -> Referee:
        self.handle = self.model.register_forward_hook(self._hear)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _hear(self, model: Any, args: Any, output: Any) -> None:
        if not self.asking:
            self.heard = output.logits[0, -1].detach()

    def token(self, token: int) -> None:
        """The run chose this token by the logits just heard."""
        assert self.heard is not None
        self.waiting.append((self.heard, token))
        if len(self.waiting) == TOGETHER:
            self._ask()

    @torch.no_grad()
    def _ask(self) -> None:
        """Read everything up to the last token, and compare what was expected in each place."""
        logits, tokens = zip(*self.waiting, strict=True)
        new = self.unread.new_tensor([tokens])
        read = torch.cat([self.unread, new[:, :-1]], 1)
        self.asking = True
        try:
            output = self.model(read, past_key_values=self.cache, use_cache=True, logits_to_keep=len(tokens))
        finally:
            self.asking = False
        full = output.logits[0].float().log_softmax(-1)
        policy = torch.stack(logits).float().log_softmax(-1)
        self.kl += (full.exp() * (full - policy)).sum(-1).clamp(min=0).tolist()
        self.log_probabilities += full.gather(-1, new[0, :, None])[:, 0].tolist()
        agree = full.argmax(-1) == policy.argmax(-1)
        if self.first_divergence is None and not bool(agree.all()):
            self.first_divergence = len(self.kl) - len(tokens) + int((~agree).nonzero()[0])
        self.same += int(agree.sum())
        self.chosen += int((full.argmax(-1) == new[0]).sum())
        self.unread, self.waiting = new[:, -1:], []

    def verdict(self) -> dict[str, Any]:
        """Over all tokens of the run.

        ``top1``: share of steps where both put the same token first. ``first_divergence``: the first step where not,
        from 0, None if there is none. ``equal_tokens``: share of the written tokens that the full cache puts first.
        ``mean_kl``, ``max_kl``: KL(full cache || policy) in nats. ``mean_log_probability``: of the written tokens under
        the full cache, natural logarithm.
        """
        if self.waiting:
            self._ask()
        count = len(self.kl)
        if not count:
            return {"mode": "teacher-forced", "tokens": 0}
        return {
            "mode": "teacher-forced",
            "tokens": count,
            "top1": self.same / count,
            "first_divergence": self.first_divergence,
            "equal_tokens": self.chosen / count,
            "mean_kl": sum(self.kl) / count,
            "max_kl": max(self.kl),
            "mean_log_probability": sum(self.log_probabilities) / count,
        }
