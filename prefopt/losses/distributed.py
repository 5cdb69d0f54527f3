"""Quantities that span processes: KTO's baseline, a token mean over the global batch.

Imports torch alone. Outside a torch.distributed run every function here returns its local value.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_sum(value: Tensor) -> Tensor:
    """Sum of `value` over processes, without gradient. Every process must call it, in the same order."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def global_mean(values: Tensor, weights: Tensor | None = None, otherwise: Tensor | float = 0.0) -> Tensor:
    """Mean of (N,) `values` over the examples of all processes, without gradient.

    Args:
        values: (N,), N may differ between processes and may be 0.
        weights: (N,) non-negative example weights; equal weights if None.
        otherwise: what to return where no process has an example.
    """
    weights = values.new_ones(values.shape) if weights is None else weights.to(values.dtype)
    total, count = global_sum((values * weights).sum()), global_sum(weights.sum())
    return torch.where(count > 0, total / count.clamp(min=1e-12), otherwise)
