"""Phi-3 and 4: queries, keys and values from one matrix. Releases for long texts turn keys otherwise once a text is
longer than what they were first trained on; transformers then reads it anew, which a policy's cache cannot."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("phi3",),
    covers="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini and reasoning; some releases have a sliding window",
)
