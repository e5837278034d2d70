"""`kvpolicy schema`: the language as a JSON Schema, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.cli import output
from kvpolicy.language.schema import json_schema

EPILOG = (
    "Example: kvpolicy schema -o kvpolicy.schema.json, and '# yaml-language-server: $schema=kvpolicy.schema.json' as "
    "the first line of a policy gives completion and checks in editors."
)


def run(
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to FILE, not stdout.")
    ] = None,
) -> None:
    """Print the JSON Schema (draft 2020-12) of the policy language."""
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if to is None:
        print(text, end="")
        return
    output.write_file(to, text)
    output.note(f"wrote {to}")
