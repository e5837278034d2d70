"""Triton's interpreter under NumPy 2.4 and newer.

The interpreter keeps a kernel's numbers as arrays of one element and turns them into the bounds of a loop by
``int(array)``, which NumPy 2.4 allows for arrays without dimensions alone. Seen in triton 3.6.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def allow_loops_over_numbers() -> None:
    """Let ``range`` take a kernel's numbers; done once in a process."""
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "allows_loops_over_numbers", False):
        return

    def patch_and_allow(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_and_allow.allows_loops_over_numbers = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_allow
