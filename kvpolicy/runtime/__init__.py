"""What a policy does: slots, pools, the five steps of a layer, the cache, the decode loop."""

from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.decode import DecodeLoop, decode_loop

__all__ = ["DecodeLoop", "PolicyCache", "decode_loop"]
