"""A journal of what was changed on a model, and its exact undo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class Missing:
    """Stands for an attribute that was not there. The class itself is the mark: it survives pickle and deepcopy."""


class Journal:
    """Changes to one model, undone in reverse order.

    It lives on the model, so that pickle and deepcopy carry it along; each change knows the value before and the
    value it put there, and is undone only where that value still stands: what others changed since is theirs. It is
    noted before it is made, so that whatever interrupts it finds it here.
    """

    def __init__(self) -> None:
        self._attributes: list[tuple[Any, str, Any, Any]] = []
        self._hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._configs: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of this instance (never of its class)."""
        self._attributes.append((owner, name, owner.__dict__.get(name, Missing), value))
        setattr(owner, name, value)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook that sees keyword arguments."""
        self._hooks.append((module, hook))
        module.register_forward_pre_hook(hook, with_kwargs=True)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward hook that sees keyword arguments."""
        self._hooks.append((module, hook))
        module.register_forward_hook(hook, with_kwargs=True)

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

    def attend_by(self, model: nn.Module, decoder: nn.Module, name: str) -> None:
        """Have a model's text decoder attend by a registered function, and no other model: configs become its own."""
        self.own_configs(model)
        configs = (module.__dict__.get("config") for module in decoder.modules())
        for config in {id(each): each for each in configs if isinstance(each, PreTrainedConfig)}.values():
            self.set(config, "_attn_implementation_internal", name)

    def undo(self) -> None:
        """Take everything back; a second call does nothing."""
        while self._hooks:
            _take_off(*self._hooks.pop())
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


def _take_off(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook, this very object, from wherever torch keeps a module's forward hooks and notes about them."""
    lists = [value for name, value in vars(module).items() if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
    gone = [key for each in lists for key, value in each.items() if value is hook]
    for key in gone:
        for each in lists:
            each.pop(key, None)


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
