"""Models by one word: built-in ones, hub ids, local folders and GGUF files. Importing this imports no torch."""

from kvpolicy.models.builtin import BuiltinModel, builtin_models, builtin_names
from kvpolicy.models.load import load_config, load_model

__all__ = ["BuiltinModel", "builtin_models", "builtin_names", "load_config", "load_model"]
