"""The seam: a policy's cache under the attention of a stock Hugging Face model, and nothing else replaced."""

from kvpolicy.patching.listening import listening
from kvpolicy.patching.patch import Patch, applied, apply, cache_for, compile_report, patch_of, remove
from kvpolicy.patching.saving import from_pretrained, load_cache, recorded_policy

__all__ = [
    "Patch",
    "applied",
    "apply",
    "cache_for",
    "compile_report",
    "from_pretrained",
    "listening",
    "load_cache",
    "patch_of",
    "recorded_policy",
    "remove",
]
