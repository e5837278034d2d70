"""Tasks by name: those in this folder, and those that installed packages add."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import kvpolicy.lab.tasks
from kvpolicy.errors import UsageError
from kvpolicy.lab.tasks.base import Task
from kvpolicy.lab.tasks.gym import PREFIX, gym_task
from kvpolicy.language.signals import loaded
from kvpolicy.language.vocabulary import nearest

GROUP = "kvpolicy.tasks"
"""The entry-point group of third parties; an entry leads to an instance of a Task."""


@cache
def tasks() -> Mapping[str, Task]:
    """Every task by its name, in the order of their names; our own win on a clash.

    Raises:
        UsageError: an installed package's task cannot be loaded, or is none.
    """
    found: dict[str, Task] = {}
    for entry in entry_points(group=GROUP):
        task = loaded(entry, f"the task `{entry.name}`")
        if not isinstance(task, Task):
            raise UsageError(
                f"the task `{entry.name}` leads to {entry.value}, which is no kvpolicy.lab.tasks.base.Task"
            )
        found[task.name] = task
    for module in pkgutil.iter_modules(kvpolicy.lab.tasks.__path__):
        task = getattr(import_module(f"{kvpolicy.lab.tasks.__name__}.{module.name}"), "TASK", None)
        if isinstance(task, Task):
            found[task.name] = task
    return dict(sorted(found.items()))


def task_named(name: str, others: Sequence[str] = ()) -> Task:
    """The task of this name.

    Args:
        others: names that --tasks knows besides, for the message.

    Raises:
        UsageError: there is none.
        MissingExtra: it needs a package that is not installed.
    """
    if name.startswith(PREFIX):
        return gym_task(name)
    if name not in tasks():
        raise UsageError(f"--tasks {name!r}: {nearest(name, [*tasks(), *others])}")
    return tasks()[name]
