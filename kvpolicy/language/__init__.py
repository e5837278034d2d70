"""What a policy says: the language's models, its quantities, and the errors that point into its text."""

from kvpolicy.language.library import shipped_policies
from kvpolicy.language.load import load_policy, loads_policy
from kvpolicy.language.policy import Policy
from kvpolicy.language.quantity import Quantity, QuantityError, Range
from kvpolicy.language.signals import SignalArgument, SignalDefinition

__all__ = [
    "Policy",
    "Quantity",
    "QuantityError",
    "Range",
    "SignalArgument",
    "SignalDefinition",
    "load_policy",
    "loads_policy",
    "shipped_policies",
]
