"""Random numbers that stay the same whether or not something is done in between."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Context after which the random state is what it was before."""
    python, numpy = random.getstate(), np.random.get_state()
    own = device.type not in ("cpu", "mps")
    try:
        with torch.random.fork_rng(devices=[device] if own else [], device_type=device.type if own else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
