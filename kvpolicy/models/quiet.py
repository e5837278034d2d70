"""Silence while a model loads: transformers draws progress bars and gives advice on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(active: bool = True) -> Iterator[None]:
    """Keep the progress bars and advice of transformers off stderr for a while."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if active:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
