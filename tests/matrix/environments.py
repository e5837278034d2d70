"""The environments of the matrix: one for each torch, and on top of each a thin one for every transformers.

A thin one sees everything of the one below it and holds what differs: transformers, and what that version pins. Both
are made once, and made anew when what they were asked for changes. pip's own settings hold, so that a folder or an
index with CPU builds of torch is taken where the user has one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "matrix"
PYPROJECT, CONSTRAINTS = ROOT / "pyproject.toml", ROOT / "constraints.txt"

BESIDE = ("pytest", "hypothesis")
"""What the tests need beside the package itself."""

VARIED = re.compile(r"(torch|triton|transformers)\b")
"""What of the constraints does not hold here."""


class NotInstalled(Exception):
    """pip could not install a version; says why in its last words."""


@dataclass(frozen=True)
class Environment:
    """A pair of versions and the Python that has both."""

    torch: str
    transformers: str

    @property
    def base(self) -> Path:
        return FOLDER / f"torch-{self.torch}"

    @property
    def thin(self) -> Path:
        return self.base / f"transformers-{self.transformers}"

    @property
    def python(self) -> Path:
        return _python(self.thin)

    def make(self) -> None:
        """Make what is missing.

        Raises:
            NotInstalled: a version cannot be had here.
        """
        _once(self.base, f"torch=={self.torch}\n{_dependencies()}", self._make_base)
        _once(self.thin, f"transformers=={self.transformers}\n", self._make_thin)

    def _make_base(self) -> None:
        venv.create(self.base, with_pip=True, clear=True)
        constraints = self.base / "constraints.txt"
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
        constraints.write_text("".join(line for line in lines if not VARIED.match(line)), encoding="utf-8")
        _pip(self.base, "install", f"torch=={self.torch}")
        _pip(self.base, "install", "-c", str(constraints), "-e", f"{ROOT}[gguf]", *BESIDE)

    def _make_thin(self) -> None:
        venv.create(self.thin, with_pip=False, clear=True)
        below = f"import site; site.addsitedir({str(_packages(self.base))!r})\n"
        (_packages(self.thin) / "base.pth").write_text(below, encoding="utf-8")
        _pip(self.base, "--python", str(self.python), "install", f"transformers=={self.transformers}")


def released(package: str, base: Path | None = None) -> list[str]:
    """Final releases of a package that pip can see, the newest first."""
    python = sys.executable if base is None else str(_python(base))
    done = subprocess.run([python, "-m", "pip", "index", "versions", package], capture_output=True, text=True)
    line = re.search(r"Available versions: (.*)", done.stdout)
    return line[1].split(", ") if line else []


def _once(folder: Path, asked: str, make: object) -> None:
    stamp = folder / "made.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == asked:
        return
    print(f"making {folder.relative_to(ROOT)}", flush=True)
    assert callable(make)
    make()
    stamp.write_text(asked, encoding="utf-8")


def _dependencies() -> str:
    """The part of pyproject.toml that decides what is installed, without the versions that vary here."""
    said = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = said[1].splitlines() if said else []
    return "\n".join(line.strip() for line in lines if line.strip() and not VARIED.match(line.strip(' "')))


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3*/site-packages")
    return found


def _pip(folder: Path, *arguments: str) -> None:
    command: Sequence[str] = (str(_python(folder)), "-m", "pip", "--disable-pip-version-check", *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotInstalled(said[-1] if said else f"pip ended with exit code {done.returncode}")
