"""Where policies' texts come from: files, standard input, and the policies that ship with kvpolicy."""

from __future__ import annotations

import sys
from functools import cache
from importlib.resources import files
from pathlib import Path

from kvpolicy.errors import Diagnostic, PolicyError
from kvpolicy.language.nodes import shown
from kvpolicy.language.reader import MAX_CHARACTERS
from kvpolicy.language.vocabulary import nearest

SUFFIXES = (".yaml", ".yml")


@cache
def shipped_policies() -> dict[str, Path]:
    """Name -> file of every policy that ships with kvpolicy."""
    found = (Path(str(entry)) for entry in files("kvpolicy.policies").iterdir())
    return {path.stem: path for path in sorted(found) if path.suffix == ".yaml"}


def is_path(reference: str) -> bool:
    """Whether a reference means a file rather than a shipped policy's name."""
    return "/" in reference or "\\" in reference or reference.endswith(SUFFIXES)


def fetch(reference: str | Path, near: str = "") -> tuple[str, str]:
    """The text of a policy and the name of its file.

    Args:
        reference: a path (it has a slash or ends in .yaml), a shipped policy's name, or "-" for standard input.
        near: name of the file that refers to it; paths are relative to that file's folder.

    Raises:
        PolicyError: there is no such file or name, or it is not a text.
    """
    if reference == "-":
        return decode(sys.stdin.buffer.read(4 * MAX_CHARACTERS + 1), "<stdin>"), "<stdin>"
    if isinstance(reference, Path) or is_path(reference):
        path = Path(near).parent / reference if near and not near.startswith("<") else Path(reference)
    else:
        path = named(reference)
    try:
        with path.open("rb") as file:
            return decode(file.read(4 * MAX_CHARACTERS + 1), str(path)), str(path)
    except OSError as error:
        raise refusal(str(path), f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null character in the path
        raise refusal(shown(path), f"cannot be read: {error}") from None


def named(name: str) -> Path:
    """The file of a shipped policy."""
    shipped = shipped_policies()
    if name not in shipped:
        hint = nearest(name, shipped)
        hint = hint if hint.startswith("did") else f"{hint}; a file's name ends in .yaml".removeprefix("; ")
        raise refusal(shown(name), "no policy has this name", hint)
    return shipped[name]


def decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = len(data[data.rfind(b"\n", 0, error.start) + 1 : error.start].decode("utf-8")) + 1
        reason = f"byte 0x{data[error.start]:02X} is not UTF-8 text"
        raise PolicyError(diagnostics=[Diagnostic(name, line, column, reason, "save the file as UTF-8")]) from None


def refusal(name: str, reason: str, hint: str = "") -> PolicyError:
    return PolicyError(diagnostics=[Diagnostic(name, 0, 0, reason, hint)])
