"""The families of models: which layers they have, which of those a policy governs, and where parity was tested.

Nothing is written down here: files in `patches/` name the families, transformers' own configs tell the layers, and
the record of `make matrix` the versions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from kvpolicy.architecture import Architecture, families
from kvpolicy.models.quiet import quiet
from kvpolicy.versions import release, tested

FULL = "full_attention"


def facts(name: str, architecture: Architecture) -> dict[str, Any]:
    """A family, ready for JSON. Importing transformers takes a second or two."""
    types = architecture.model_types
    return {
        "name": name,
        "summary": architecture.covers,
        "refused": architecture.refused,
        "model_types": list(types),
        "layers": {model_type: layers(model_type) for model_type in types},
        "tested": {model_type: versions(model_type) for model_type in types},
    }


def layers(model_type: str) -> dict[str, Any] | None:
    """What transformers' default config of a type says of its layers; None where this transformers does not know it.

    ``kinds``: how many layers of each kind, as `layer_types` names them. ``window``: whether a `sliding_window` in the
    config, with no layer types beside it, would hold for all of them. ``governed``: how many a policy governs.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        return None
    with quiet():
        config = AutoConfig.for_model(model_type).get_text_config()
    named = getattr(config, "layer_types", None)
    kinds = Counter(named or [FULL] * config.num_hidden_layers)
    return {
        "kinds": dict(sorted(kinds.items())),
        "window": not named and hasattr(config, "sliding_window"),
        "governed": kinds[FULL],
    }


def versions(model_type: str) -> dict[str, list[str]]:
    """Versions of transformers and torch on which all tests of a type passed, the oldest first."""
    return {package: tested(package, model_type) for package in ("transformers", "torch")}


def row(entry: dict[str, Any]) -> list[str]:
    """A family as a row: its name, model types, layers, what a policy governs, where it was tested."""
    known = [told for told in entry["layers"].values() if told is not None]
    return [
        entry["name"],
        ", ".join(entry["model_types"]),
        _each(_kinds(told) for told in known) or "unknown to this transformers",
        "none: refused" if entry["refused"] else _each(_governed(told) for told in known),
        "" if entry["refused"] else _versions(entry["tested"]),
    ]


COLUMNS = ["family", "model types", "layers", "a policy governs", "parity tested on"]


def rows() -> list[dict[str, Any]]:
    """Every family that is installed."""
    return [facts(name, architecture) for name, architecture in sorted(families().items())]


def _each(words: Any) -> str:
    return "; ".join(dict.fromkeys(words))


def _kinds(told: dict[str, Any]) -> str:
    words = [kind.removesuffix("_attention") for kind in told["kinds"]]
    if len(words) > 1:
        words = [f"{count} {word}" for word, count in zip(words, told["kinds"].values(), strict=True)]
    return ", ".join(words) + (", or all sliding" if told["window"] else "")


def _governed(told: dict[str, Any]) -> str:
    some = len(told["kinds"]) > 1 or told["window"]
    return ("the full ones" if some else "all") if told["governed"] else "none"


def _versions(told: dict[str, dict[str, list[str]]]) -> str:
    """`transformers 5.0.0 to 5.23.0`: those on which every type passed; where types differ, the fewest."""
    passed = set.intersection(*(set(each["transformers"]) for each in told.values()))
    ends = sorted(passed, key=release)
    if not ends:
        return "not yet"
    return f"transformers {ends[0]}" + (f" to {ends[-1]}" if len(ends) > 1 else "")
