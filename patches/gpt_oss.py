"""gpt-oss: sliding and full layers in turn, and in every softmax a sink for each head."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=("gpt_oss",),
    covers="gpt-oss 20B and 120B",
    sinks=True,
)
