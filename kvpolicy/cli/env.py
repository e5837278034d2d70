"""`kvpolicy env`: what a bug report should say about the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import kvpolicy
from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json
from kvpolicy.models.smollm2 import cache_folder

EPILOG = "Example: kvpolicy env --devices, pasted whole into a bug report."

_VARIABLES = re.compile(r"KVPOLICY_\w+|CUDA_VISIBLE_DEVICES|HF_HOME|HF_HUB_OFFLINE|OMP_NUM_THREADS|NO_COLOR|TORCH_LOGS")


def run(
    devices: Annotated[bool, typer.Option("--devices", help="Name the devices too; imports torch (seconds).")] = False,
    json: Json = False,
) -> None:
    """Print versions, paths and settings for a bug report."""
    facts = collect(devices)
    if json:
        output.json_object(facts)
        return
    rows = [(name, value) for name, value in facts.items() if isinstance(value, str)]
    rows += [row for group in facts.values() if isinstance(group, dict) for row in group.items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        output.data(f"[bold]{name:<{width}}[/]  {escape(value)}")


def collect(devices: bool = False) -> dict[str, str | dict[str, str]]:
    """Facts about this installation; `devices` adds what torch sees, which takes as long as importing torch."""
    facts: dict[str, str | dict[str, str]] = {
        "kvpolicy": kvpolicy.__version__,
        "location": str(Path(kvpolicy.__file__).parent),
        "cache": str(cache_folder()),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "packages": packages(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
    }
    if devices:
        facts["devices"] = _devices()
    return facts


def packages() -> dict[str, str]:
    """Installed version of everything that kvpolicy can use, by package name; what is not installed is left out."""
    found = {}
    for requirement in sorted({*_requirements(), "triton"}):
        try:
            found[requirement] = metadata.version(requirement)
        except metadata.PackageNotFoundError:
            continue
    return found


def _requirements() -> list[str]:
    """Names of what kvpolicy's own metadata requires, the extras for building and testing it left out."""
    try:
        stated = metadata.requires("kvpolicy") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        project = tomllib.loads((Path(kvpolicy.__file__).parents[1] / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        stated = project["dependencies"] + [f'{item}; extra == "{name}"' for name, items in extras for item in items]
    names = (re.match(r"[\w.-]+", item) for item in stated if not re.search(r"extra == .(test|dev)\b", item))
    return [name.group().lower() for name in names if name]


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
