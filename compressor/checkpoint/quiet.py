"""transformers without its bars and reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, and no reports on what we look at, and refuse, ourselves."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            with suppress(AttributeError):
                logging.enable_progress_bar()
