"""Where compiled code is kept between processes: a folder of kvpolicy's own, instead of one that machines wipe.

torch keeps what Inductor and AOTAutograd made under the temp folder, unless `TORCHINDUCTOR_CACHE_DIR` says otherwise.
Here it says otherwise while a step of ours is compiled, and at no other time: what others compile stays where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def artefact_folder() -> Path:
    """Below `KVPOLICY_CACHE`, or the user's cache folder of this system. It may be deleted at any time."""
    return Path(os.environ.get("KVPOLICY_CACHE") or user_cache_dir("kvpolicy", appauthor=False)) / "compiled"


@contextmanager
def artefacts_kept() -> Iterator[None]:
    """Inside, torch reads and writes compiled code in our folder; not where the user chose one, or ours is closed.

    torch writes its own choice into the environment when it first compiles: that is no choice of the user.
    """
    before = os.environ.get(VARIABLE)
    folder = artefact_folder()
    if before not in (None, os.path.abspath(default_cache_dir())) or not _writable(folder):
        yield
        return
    os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
