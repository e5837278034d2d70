"""Every shipped policy, once with room for everything and once too small for a text of some eighty tokens."""

from kvpolicy.language import Policy, load_policy, shipped_policies

TIGHT: dict[str, dict[str, object]] = {
    "raas": {"budget": 48, "page_size": 4},
    "h2o": {"heavy": 10, "recent": 6},
    "tova": {"budget": 20},
    "streaming-llm": {"sinks": 3, "window": 13},
    "window": {"window": 17},
    "random": {"budget": 40, "seed": 3},
    "random-unpinned": {"budget": 18},
    "scope-slide": {"alpha": 14, "alpha2": 3, "beta1": 9, "beta2": 7},
    "scope-adaptive": {"alpha": 14, "alpha2": 3, "beta1": 9, "beta2": 7, "horizon": 60},
    "scope-discontinuous": {"alpha": 14, "alpha2": 3, "beta1": 9, "beta2": 7, "horizon": 60},
}
ROOMY: dict[str, dict[str, object]] = {
    "h2o": {"heavy": 500, "recent": 500},
    "scope-slide": {"alpha": 1000, "beta1": 500, "beta2": 500},
    "scope-adaptive": {"alpha": 1000, "beta1": 500, "beta2": 500},
    "scope-discontinuous": {"alpha": 1000, "beta1": 500, "beta2": 500},
}
NAMES = shipped_policies()
EVICTING = [name for name in NAMES if name != "dense"]


def tight(name: str) -> Policy:
    """The policy at a size that must evict."""
    return load_policy(name, set=TIGHT.get(name, {}))


def roomy(name: str) -> Policy:
    """The policy at a size that keeps some two thousand tokens."""
    return load_policy(name, set=ROOMY.get(name, {}))
