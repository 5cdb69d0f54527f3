"""Memory of models that are no longer used."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
