"""`kvpolicy env`: what a bug report should say about the machine."""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import kvpolicy
from kvpolicy.cli import output
from kvpolicy.cli.arguments import Json

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
    for topic, value in facts.items():
        lines = value.items() if isinstance(value, dict) else [("", value)]
        for name, item in lines:
            output.data(f"[bold]{topic}[/]{' ' if name else ''}{name}: {escape(str(item))}")


def collect(devices: bool = False) -> dict[str, Any]:
    """Facts about this installation; `devices` adds what torch sees, which takes as long as importing torch."""
    facts: dict[str, Any] = {
        "kvpolicy": kvpolicy.__version__,
        "location": str(Path(kvpolicy.__file__).parent),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "package": packages(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
    }
    if devices:
        facts["device"] = _devices()
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
    """Names that kvpolicy's own metadata requires, extras included."""
    try:
        stated = metadata.requires("kvpolicy") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        project = tomllib.loads((Path(kvpolicy.__file__).parents[1] / "pyproject.toml").read_text())["project"]
        stated = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = (re.match(r"[\w.-]+", item) for item in stated)
    return [name.group().lower() for name in names if name and name.group() != "kvpolicy"]


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
