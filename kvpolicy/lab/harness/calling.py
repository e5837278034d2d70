"""lm-eval's own command line, called with a model type that it does not know by itself.

Released versions find model types in a list of their own and read no entry points, so ours is registered first, in the
same process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from kvpolicy.errors import MissingExtra, UsageError

OURS = ("--model", "-m", "--model_args", "-a")
"""What ``kvpolicy eval`` says to lm-eval by itself."""


def require_harness() -> None:
    """Raises MissingExtra where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval is not installed; install it with: pip install 'kvpolicy[eval]'")


def call_harness(arguments: Sequence[str]) -> None:
    """Run lm-eval with these arguments, as its command would; it prints its tables itself.

    Raises:
        MissingExtra: it is not installed.
        KvpolicyError: what the policy or the model has against it.
    """
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    from kvpolicy.lab.harness import model  # noqa: F401  registers the model type

    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def arguments_of(model_args: Mapping[str, str], rest: Sequence[str]) -> list[str]:
    """What lm-eval is told: our model type with its arguments, and then the user's own.

    Raises:
        UsageError: an argument that lm-eval would cut in two, or one of the user's that says what ours say.
    """
    for word in rest:
        if word.partition("=")[0] in OURS:
            raise UsageError(
                f"{word} is said by SPEC and MODEL already; drop it, or call python -m kvpolicy.lab.harness"
            )
    if not any(word.startswith("-") for word in rest):
        raise UsageError("lm-eval needs to know what to run: put its arguments after --, as in -- --tasks gsm8k")
    for name, value in model_args.items():
        if "," in value or "=" in value:
            raise UsageError(f"lm-eval splits its model arguments at commas and =, which {name}={value} has; rename it")
    told = ",".join(f"{name}={value}" for name, value in model_args.items())
    return ["--model", "kvpolicy", "--model_args", told, *rest]
