"""What a policy does: slots, pools, the five steps of a layer, the cache."""

from kvpolicy.runtime.cache import PolicyCache

__all__ = ["PolicyCache"]
