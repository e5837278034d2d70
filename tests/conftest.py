"""Settings that hold for the whole test suite: no network but for what a test asks for, one thread, no deadlines."""

import os

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]  # for the tests of our own plugin; here, for pytest takes it from the top conftest alone

# Before anything imports these libraries: only the fetch of SmolLM2, through pip, may use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A developer's display settings are none of the tests' business.
for name in ("NO_COLOR", "FORCE_COLOR", "KVPOLICY_DEBUG"):
    os.environ.pop(name, None)
os.environ["COLUMNS"] = "100"

# Machines that run these tests may be busy: no deadline per example. CI draws the same examples every time.
settings.register_profile("kvpolicy", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("kvpolicy")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`gpu` means it. The kernel tests run elsewhere too, interpreted, and get the marker on a GPU: tests/attention."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
