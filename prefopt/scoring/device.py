"""Tensors that are made on the host and used on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_device(data: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.tensor(data, device=device)`, which on a GPU does not wait for the work that the GPU has been given."""
    made = torch.tensor(data, dtype=dtype, device="cpu")
    if device.type != "cuda" or not made.numel():
        return made.to(device)
    # Only a copy from pinned memory takes its place in the GPU's queue.
    return made.pin_memory().to(device, non_blocking=True)


def places_of(wanted: Sequence[bool], device: torch.device) -> Tensor:
    """(M,) the places at which `wanted` is true."""
    return on_device([place for place, here in enumerate(wanted) if here], device, torch.long)
