"""Importing large libraries. Imports nothing of the package."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Import inside it what makes hundreds of thousands of objects that stay, such as torch and transformers.

    Python's garbage collector would look at them a thousand times, which takes more than a second.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
