"""A pool of cached tokens: its answers to the questions a policy is asked."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from kvpolicy.language.base import Complaint, OneOrMany, Spelled, Strict, Unless, Words
from kvpolicy.language.quantity import Quantity
from kvpolicy.language.scope import Count, Fixed, FixedShare, Reach, Tokens
from kvpolicy.language.scorer import Scorer

KINDS = {
    "prompt": frozenset({"prompt"}),
    "generated": frozenset({"generated"}),
    "all": frozenset({"prompt", "generated"}),
}


class Admit(Spelled):
    """Which tokens enter the pool. Pools are read top-down, and the first that admits a token takes it."""

    WORDS: ClassVar[Words] = {
        "prompt": ("tokens of prompt passes", {"word": "prompt"}),
        "generated": ("tokens of generated passes", {"word": "generated"}),
        "all": ("every token", {"word": "all"}),
    }

    tokens: Literal["special"] | None = None
    """prompt tokens that the caller flags as special"""

    modality: Literal["image"] | None = None
    """prompt tokens of one modality"""

    @property
    def kind(self) -> str:
        return self.word or self.tokens or "modality"

    @property
    def kinds(self) -> frozenset[str]:
        """Which of "prompt", "generated", "special" and "image" it lets in."""
        return KINDS.get(self.kind) or frozenset({str(self.tokens or self.modality)})


class Pin(Spelled):
    """Tokens that are never evicted."""

    NOUN = "a way to pin tokens"

    WORDS: ClassVar[Words] = {"survivors": ("units that were present at an update that fired", {"word": "survivors"})}

    first: Reach | None = None
    """the first n tokens that entered the pool"""

    tokens: Literal["special"] | None = None
    """prompt tokens that the caller flags as special"""

    @property
    def kind(self) -> str:
        return self.tokens or super().kind

    @property
    def count(self) -> Quantity | None:
        return self.first


class Evict(Strict):
    """Who goes when the pool is over its budget, and where to."""

    EXAMPLE = "{scope: kv-head}"

    scope: Literal["kv-head", "layer", "across-heads"] = "kv-head"
    """`kv-head`: each KV head drops its own lowest; `layer`: one set for all, by the mean score; `across-heads`: heads
    compete, and the budget is their mean"""

    floor: FixedShare = Quantity.number(0)
    """with `across-heads`, the share of its budget that a head keeps in any case"""

    to: str | None = None
    """the pool that takes what this one drops; positions are kept, memory starts anew"""


class Update(Spelled):
    """When the pool drops what is over its budget."""

    WORDS: ClassVar[Words] = {
        "every-step": ("at every generated pass, and at the end of a prompt turn", {"every": "1"}),
        "prompt-end": ("at the end of a prompt turn only", {"word": "prompt-end"}),
    }

    every: Count = Quantity.number(1)
    """at generated passes where t is a multiple of n, and at the end of a prompt turn"""


class Read(Strict):
    """Which tokens a generated pass attends to; the others have attention 0."""

    EXAMPLE = "{top: 1024, scorer: {signal: page-bound}}"

    top: Tokens
    """tokens read per KV head, in whole pages, the newest page among them"""

    scorer: Scorer
    """how pages are ranked for reading, by the query of this pass"""


class Store(Strict):
    """Keys and values kept as whole numbers of few bits, with one scale per group."""

    EXAMPLE = "{bits: 8, group: 64}"

    bits: Count
    """bits of one stored number: 2, 4 or 8"""

    group: Count = Quantity.number(64)
    """numbers that share a scale"""

    keys: Literal["channel", "token"] = "channel"
    """what a group of keys runs along"""

    values: Literal["channel", "token"] = "token"
    """what a group of values runs along"""

    @field_validator("bits")
    @classmethod
    def _bits(cls, bits: Quantity) -> Quantity:
        if bits.constant is not None and bits.constant not in (2, 4, 8):
            raise Complaint(f"numbers of {bits.canonical} bits are not stored", "write 2, 4 or 8")
        return bits


class Pool(Strict):
    """A pool of cached tokens. Pools are disjoint, and a token's fate depends on its own pool alone."""

    EXAMPLE = "{admit: generated, budget: 1024}"
    NOUN = "a pool"

    admit: Admit | None = None
    """which tokens enter; absent: only what another pool's `evict: {to: …}` sends"""

    budget: Tokens | None = None
    """tokens that may stay, protected ones included; absent: all"""

    page: Fixed = Quantity.number(1)
    """tokens per page; pages are kept or dropped whole, and the newest is never dropped"""

    pinned: Annotated[tuple[Pin, ...], OneOrMany()] = ()
    """tokens that are never dropped: one answer or a list"""

    window: Reach | None = None
    """the newest n positions of this pool are never dropped"""

    scorer: Scorer | None = None
    """how the others are ranked; absent: by recency"""

    evict: Evict = Evict()
    """who goes, and where to"""

    update: Update = Update()
    """when the budget is enforced"""

    read: Annotated[Read | None, Unless("all", Read.EXAMPLE)] = None
    """which tokens generated passes attend to; `all` by default"""

    store: Annotated[Store | None, Unless("model", Store.EXAMPLE)] = None
    """how keys and values are stored; as the model's own type, `model`, by default"""

    @model_validator(mode="before")
    @classmethod
    def _deleted(cls, data: Any, info: ValidationInfo) -> Any:
        """`null` in an override gives a key its default back."""
        if info.context is None or not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: fields[k].get_default() if v is None and k in fields else v for k, v in data.items()}

    @property
    def admits(self) -> frozenset[str]:
        """Which of "prompt", "generated", "special" and "image" enter."""
        return self.admit.kinds if self.admit else frozenset()

    def patched(self, patch: Pool) -> Pool:
        """This pool with the keys that `patch` was given."""
        return self.model_copy(update={key: getattr(patch, key) for key in patch.model_fields_set})
