"""The decode kernels as torch ops: opaque to compilers, exact about what they write.

``kvpolicy::decode_step`` writes into the cache in place. Compiled by Inductor it stays in place: a test reads the
generated code. ``kvpolicy::attend_slots`` is a function of its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.attention.formula import Formula
from kvpolicy.attention.kernels import available
from kvpolicy.attention.kernels.form import FORMS
from kvpolicy.attention.torch_backend import attend_slots as torch_attend_slots
from kvpolicy.errors import UsageError


@torch.library.custom_op("kvpolicy::decode_step", mutates_args=("state",))
def decode_step(
    query: Tensor, key: Tensor, value: Tensor, state: list[Tensor], given: list[Tensor], scaling: float, form: str
) -> Tensor:
    """The five steps of a generated pass in two launches.

    Args:
        query: [B, Q, 1, D]; ``key`` and ``value`` [B, K, 1, D].
        state, given: the tensors that the form lists, written and read.
        form: the name of a form that was registered (``kernels/form.py``).

    Returns:
        Attention [B, 1, Q, D].

    Raises:
        UsageError: on a CPU, outside of Triton's interpreter.
    """
    reason = available(query.device)
    if reason is not None:
        raise UsageError(f"backend triton: {reason}")
    from kvpolicy.attention.kernels import launch

    known = FORMS[form]
    tensors = {
        role: tensor
        for all_roles, held in ((known.state, state), (known.given, given))
        for roles, tensor in zip(all_roles, held, strict=True)
        for role in roles
    }
    return launch.decode_step(known, query, key, value, tensors, scaling)


@decode_step.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, state: list[Tensor], given: list[Tensor], scaling: float, form: str
) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


@torch.library.custom_op("kvpolicy::attend_slots", mutates_args=())
def attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over the resident slots.

    Args:
        query: [B, K, G, D]; ``keys`` and ``values`` [B, K, S, D]; ``position`` int32 [B, K, S], -1 where empty.

    Returns:
        Output [B, K, G, D], and the logits float32 [B, K, G, S], -inf where a slot is empty; [B, K, G, 0] where they
        are not wanted. On a CPU outside of Triton's interpreter the torch backend computes it.
    """
    if available(query.device) is None:
        from kvpolicy.attention.kernels import launch

        return launch.attend_slots(query, keys, values, position, scaling, wants_logits)
    out, logits, _ = torch_attend_slots(query, keys, values, position < 0, Formula(scaling))
    return out, logits if wants_logits else logits[..., :0].contiguous()


@attend_slots.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float, wants_logits: bool
) -> tuple[Tensor, Tensor]:
    slots = keys.shape[2] if wants_logits else 0
    return query.new_empty(query.shape), query.new_empty((*query.shape[:3], slots), dtype=torch.float32)
