"""Hush transformers while it loads small models: its bars and notes would drown the one line that matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Only errors are logged inside the block, and no progress is drawn unless ``bars``; restored afterwards."""
    from transformers.utils import logging

    level, drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if drawn:
            logging.enable_progress_bar()
