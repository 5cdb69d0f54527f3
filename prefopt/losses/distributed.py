"""Quantities that span processes: KTO's baseline, a token mean over the global batch.

Imports torch alone. Outside a torch.distributed run every function here returns its local value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in their order. Every process must call it, in the same order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def global_sum(value: Tensor) -> Tensor:
    """Sum of `value` over processes, without gradient. Every process must call it, in the same order."""
    value = value.detach()
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean_gradient(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Mean of a gradient over processes, in place; None counts as zero. Every process must call it, in order."""
    made = torch.zeros_like(parameter) if gradient is None else gradient
    if world_size() > 1:
        dist.all_reduce(made)
        made /= world_size()
    return made


def global_mean(values: Tensor, weights: Tensor | None = None, otherwise: Tensor | float = 0.0) -> Tensor:
    """Mean of (N,) `values` over the examples of all processes, without gradient.

    Args:
        values: (N,), N may differ between processes and may be 0.
        weights: (N,) non-negative example weights; equal weights if None.
        otherwise: what to return if no process has an example.
    """
    weights = values.new_ones(values.shape) if weights is None else weights.to(values.dtype)
    total, count = global_sum((values * weights).sum()), global_sum(weights.sum())
    return torch.where(count > 0, total / count.clamp(min=1e-12), otherwise)


def present(values: Tensor, weights: Tensor | None) -> Tensor:
    """(N,) 1 for every example with a weight above 0, else 0, in the type of `values`."""
    return torch.ones_like(values) if weights is None else (weights > 0).to(values)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes; its gradient is summed over them too, because every process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return global_sum(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return global_sum(grad.contiguous())


def global_total(value: Tensor) -> Tensor:
    """Sum of `value` over processes, with gradient. Under DDP's averaging the gradient is that of one big batch."""
    if world_size() == 1:
        return value
    total: Tensor = _SumOverProcesses.apply(value)  # type: ignore[no-untyped-call]
    return total


def global_moments(values: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased variance and standard deviation of (N,) `values` over all processes, with gradient.

    Args:
        values: (N,).
        weights: (N,) non-negative; an example of weight 0 counts as absent. Equal weights if None.

    Returns:
        Three scalars. A single example has variance 0, with gradient 0.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    count, squares = global_sum(weights.sum()), global_sum((weights**2).sum())
    mean = global_total((weights * values).sum()) / count.clamp(min=1e-12)
    # n - 1 for equal weights.
    freedom = count - squares / count.clamp(min=1e-12)
    spread = global_total((weights * (values - mean) ** 2).sum())
    variance = torch.where(freedom > 1e-6, spread / freedom.clamp(min=1e-6), torch.zeros_like(spread))
    positive = variance > 0
    std = torch.where(positive, torch.sqrt(torch.where(positive, variance, torch.ones_like(variance))), 0 * variance)
    return mean, variance, std


def global_concat(values: Tensor) -> Tensor:
    """(M,) the (N,) `values` of every process joined in the order of processes, without gradient; N may differ."""
    values = values.detach()
    if world_size() == 1:
        return values
    sizes = [torch.zeros((), dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(values.shape[0], device=values.device))
    longest = max(int(size) for size in sizes)
    padded = torch.nn.functional.pad(values, (0, longest - values.shape[0]))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
