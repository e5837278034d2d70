"""KV-cache policies written in YAML, compiled into cache modules under stock Hugging Face models.

The public names below load the modules that define them when they are first used, so that importing kvpolicy, or
checking a policy, never waits for torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpolicy.errors import (
        CacheError,
        KvpolicyError,
        MissingExtra,
        ModelError,
        PolicyError,
        UsageError,
    )
    from kvpolicy.language import Policy, load_policy, loads_policy
    from kvpolicy.patching import applied, apply, from_pretrained, remove
    from kvpolicy.plan import ModelGeometry, Plan, make_plan
    from kvpolicy.runtime import PolicyCache

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it; a test holds it against the imports above
    "CacheError": "errors",
    "KvpolicyError": "errors",
    "MissingExtra": "errors",
    "ModelError": "errors",
    "PolicyError": "errors",
    "UsageError": "errors",
    "Policy": "language",
    "load_policy": "language",
    "loads_policy": "language",
    "ModelGeometry": "plan",
    "Plan": "plan",
    "make_plan": "plan",
    "PolicyCache": "runtime",
    "applied": "patching",
    "apply": "patching",
    "from_pretrained": "patching",
    "remove": "patching",
}

__all__ = [  # noqa: PLE0604  (strings, all of them)
    "__version__",
    *sorted(_HOME),
]

# In a checkout, patches/ and policies/ lie beside this package instead of inside it.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "patches").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvpolicy' has no attribute {name!r}")
    value = getattr(import_module(f"kvpolicy.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
