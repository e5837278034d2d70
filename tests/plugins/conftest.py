"""Packages that add signals, put on the path as an installer would, and taken off again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from kvpolicy.language import signals
from kvpolicy.oracle.signals import plugged_in

Install = Callable[..., Path]


def forget() -> None:
    """What was read of entry points, and loaded from them."""
    importlib.invalidate_caches()
    for cached in (signals.plugin_entries, signals._plugged_in, plugged_in):
        cached.cache_clear()
    if "kvpolicy.scorers" in sys.modules:
        known = sys.modules["kvpolicy.scorers"].SIGNALS
        for name in known.keys() - signals.SIGNALS.keys():
            del known[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install("my-scorer", {"my_scorer.py": "…"}, {"key-power": "my_scorer:KEY_POWER"}): returns its folder."""
    loaded = set(sys.modules)

    def install(name: str, files: dict[str, str], entries: dict[str, str], version: str = "1.2") -> Path:
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{signal} = {value}\n" for signal, value in entries.items())
        (info / "entry_points.txt").write_text(f"[kvpolicy.scorers]\n{lines}")
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(dedent(text))
        monkeypatch.syspath_prepend(site)
        forget()
        return site

    yield install
    monkeypatch.undo()
    forget()
    for module in set(sys.modules) - loaded:
        if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[module]
