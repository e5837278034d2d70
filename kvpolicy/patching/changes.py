"""A journal of what was changed on a model, and its exact undo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig


class Missing:
    """Stands for an attribute that was not there. The class itself is the mark: it survives pickle and deepcopy."""


class Journal:
    """Changes to one model, undone in reverse order.

    It lives on the model, so that pickle and deepcopy carry it along; each change knows the value before and the
    value it put there, and is undone only where that value still stands: what others changed since is theirs.
    """

    def __init__(self) -> None:
        self._attributes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._configs: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of this instance (never of its class)."""
        before = owner.__dict__.get(name, Missing)
        setattr(owner, name, value)
        self._attributes.append((owner, name, before, value))

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook that sees keyword arguments."""
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward hook that sees keyword arguments."""
        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def own_configs(self, model: nn.Module) -> None:
        """Give a model its own copy of every config that its modules hold.

        Two models built from one config object share it, so a change to it would reach a model that nobody patched.
        """
        copies: dict[int, PreTrainedConfig] = {}
        for module in model.modules():
            config = module.__dict__.get("config")
            if not isinstance(config, PreTrainedConfig):
                continue
            if id(config) not in copies:
                copies[id(config)] = own = copy.copy(config)
                self._configs.append((config, own, dict(config.__dict__)))
            self.set(module, "config", copies[id(config)])

    def undo(self) -> None:
        """Take everything back; a second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._attributes:
            owner, name, before, value = self._attributes.pop()
            if owner.__dict__.get(name, Missing) is not value:
                continue
            if before is Missing:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        while self._configs:
            _carry_over(*self._configs.pop())


def _carry_over(original: PreTrainedConfig, own: PreTrainedConfig, snapshot: dict[str, Any]) -> None:
    """Copy what the user set on the model's own config, while it was patched, to the one that returns."""
    for name in own.__dict__.keys() | snapshot.keys():
        value = own.__dict__.get(name, Missing)
        if value is snapshot.get(name, Missing):
            continue
        if value is Missing:
            original.__dict__.pop(name, None)
        else:
            original.__dict__[name] = value
