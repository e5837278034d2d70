"""Every error a user of kvpolicy can meet, and the exit code each one gives the command line.

An error says what is wrong, where, the limit, and the way out. Anything else that escapes is our bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class KvpolicyError(Exception):
    """Root of all errors raised for the user; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(KvpolicyError, ValueError):
    """A command or a call was given arguments that make no sense together."""

    exit_code = 2


class CacheError(KvpolicyError, RuntimeError):
    """Something a policy's cache cannot do: crop, roll back, take a longer prompt than was planned."""

    exit_code = 2


class ModelError(KvpolicyError):
    """A model that was not found, cannot be patched, or does not fit the policy."""

    exit_code = 4


class MissingExtra(KvpolicyError):
    """A verb needs a package that is not installed; the message names the extra that brings it."""

    exit_code = 5


@dataclass(frozen=True)
class Diagnostic:
    """One mistake in a policy, with the place it points at.

    line and column count from 1; `width` characters of `snippet` (the whole source line) are underlined.
    `hint` is the way out, where there is one. `line` 0 means the mistake is nowhere in a text.
    """

    file: str
    line: int
    column: int
    reason: str
    hint: str = ""
    snippet: str = ""
    width: int = 1

    @property
    def place(self) -> str:
        """`file:line:column`, or the file alone when there is no line."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.reason}"]
        if self.snippet:
            gutter = f"{self.line:>5} | "
            text, start = self._cropped()
            # Tabs are kept in the underline's margin, so that the caret lands where the terminal puts the text.
            margin = "".join("\t" if letter == "\t" else " " for letter in text[:start])
            carets = "^" * max(1, min(self.width, len(text) - start))
            lines += [f"{gutter}{text}", f"{' ' * (len(gutter) - 2)}| {margin}{carets}"]
        if self.hint:
            lines.append(f"      = {self.hint}")
        return "\n".join(lines)

    def _cropped(self) -> tuple[str, int]:
        """The snippet, cut to what fits around the place, and where in it the place is."""
        start, most = self.column - 1, 120
        if len(self.snippet) <= most:
            return self.snippet, start
        left = max(0, min(start - most // 2, len(self.snippet) - most))
        cut = self.snippet[left : left + most]
        cut = "…" + cut[1:] if left else cut
        return (cut[:-1] + "…" if left + most < len(self.snippet) else cut), start - left


class PolicyError(KvpolicyError, ValueError):
    """A policy that cannot be read or makes no sense; `diagnostics` holds every mistake found, in order."""

    exit_code = 3

    def __init__(self, message: str = "", diagnostics: Iterable[Diagnostic] = ()) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(message or "\n".join(str(item) for item in self.diagnostics))


class UntestedWarning(UserWarning):
    """What runs has not been tested with kvpolicy: a family of models that it does not know."""
