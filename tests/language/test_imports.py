"""Reading a policy needs neither torch nor a plug-in's code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.language import loads_policy, signals

PROGRAM = """
import sys
import kvpolicy.errors
from kvpolicy.language import load_policy
from kvpolicy.language.schema import json_schema
from kvpolicy.language.reference import render_reference
load_policy("raas", {"budget": 64}), json_schema(), render_reference()
print([name for name in ("torch", "transformers", "numpy", "rich", "typer") if name in sys.modules])
"""


def test_nothing_heavy_is_imported():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plugin_is_not_loaded_before_a_policy_names_its_signal(monkeypatch):
    entry = EntryPoint("gate", "a_package_that_is_not_installed:GATE", signals.ENTRY_POINTS)
    monkeypatch.setattr(signals, "entry_points", lambda group: [entry] if group == signals.ENTRY_POINTS else [])
    signals.plugin_entries.cache_clear()
    text = "kvpolicy: 1\nname: x\npools: {all: {admit: all, budget: 9, scorer: {signal: %s}}}\n"
    try:
        assert loads_policy(text % "key-norm").pools["all"].scorer.signal.name == "key-norm"
        broken = r"3:55: the signal `gate` of .* cannot be loaded from .*: ModuleNotFoundError"
        with pytest.raises(PolicyError, match=broken):
            loads_policy(text % "gate")
    finally:
        signals.plugin_entries.cache_clear()
