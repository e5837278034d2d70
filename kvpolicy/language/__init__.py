"""What a policy says: the language's models, its quantities, and the errors that point into its text."""

from kvpolicy.language.quantity import Quantity, QuantityError, Range

__all__ = ["Quantity", "QuantityError", "Range"]
