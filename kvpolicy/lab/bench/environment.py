"""Where numbers come from: versions, the device, threads, the date."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers

import kvpolicy
from kvpolicy.lab.bench.racing import device_name


def environment(device: torch.device) -> dict[str, Any]:
    """Plain data for a saved report."""
    told: dict[str, Any] = {
        "kvpolicy": kvpolicy.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "device": device_name(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    return told


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
