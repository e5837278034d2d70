"""KV-cache policies written in YAML, compiled into cache modules under stock Hugging Face models.

The public names below load the modules that define them when they are first used, so that importing kvpolicy, or
checking a policy, never waits for torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpolicy.errors import CacheError as CacheError
    from kvpolicy.errors import KvpolicyError as KvpolicyError
    from kvpolicy.errors import MissingExtra as MissingExtra
    from kvpolicy.errors import ModelError as ModelError
    from kvpolicy.errors import PolicyError as PolicyError
    from kvpolicy.errors import UsageError as UsageError
    from kvpolicy.language import Policy as Policy
    from kvpolicy.language import SignalArgument as SignalArgument
    from kvpolicy.language import SignalDefinition as SignalDefinition
    from kvpolicy.language import load_policy as load_policy
    from kvpolicy.language import loads_policy as loads_policy
    from kvpolicy.patching import applied as applied
    from kvpolicy.patching import apply as apply
    from kvpolicy.patching import cache_for as cache_for
    from kvpolicy.patching import compile_report as compile_report
    from kvpolicy.patching import from_pretrained as from_pretrained
    from kvpolicy.patching import load_cache as load_cache
    from kvpolicy.patching import remove as remove
    from kvpolicy.plan import ModelGeometry as ModelGeometry
    from kvpolicy.plan import Plan as Plan
    from kvpolicy.plan import make_plan as make_plan
    from kvpolicy.runtime import DecodeLoop as DecodeLoop
    from kvpolicy.runtime import PolicyCache as PolicyCache
    from kvpolicy.runtime import decode_loop as decode_loop

__version__ = "0.1.0"

_PUBLIC = {  # module -> the public names it defines; a test holds this against the imports above
    "errors": ("CacheError", "KvpolicyError", "MissingExtra", "ModelError", "PolicyError", "UsageError"),
    "language": ("Policy", "SignalArgument", "SignalDefinition", "load_policy", "loads_policy"),
    "plan": ("ModelGeometry", "Plan", "make_plan"),
    "runtime": ("DecodeLoop", "PolicyCache", "decode_loop"),
    "patching": ("applied", "apply", "cache_for", "compile_report", "from_pretrained", "load_cache", "remove"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

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
