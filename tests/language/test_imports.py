"""Reading a policy needs neither torch nor a plug-in's code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

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


def test_signals_of_plugins_are_names_only(monkeypatch):
    entry = EntryPoint("gate", "a_package_that_is_not_installed:Gate", signals.ENTRY_POINTS)
    monkeypatch.setattr(signals, "entry_points", lambda group: [entry] if group == signals.ENTRY_POINTS else [])
    signals.plugin_signals.cache_clear()
    try:
        policy = loads_policy(
            "kvpolicy: 1\nname: x\nparams: {w: {default: 3, help: width}}\n"
            "pools: {all: {admit: all, budget: 9, scorer: {signal: {gate: {width: w, mode: fast, on: true}}}}}\n"
        )
    finally:
        signals.plugin_signals.cache_clear()
    signal = policy.pools["all"].scorer.signal
    assert signal.name == "gate" and signal.args["width"].constant == 3
    assert signal.args["mode"] == "fast" and signal.args["on"] is True
