"""Functions that stay finite where their textbook form does not. Imports torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXP_CAP = 30.0
"""Where `capped_exp` continues as a straight line: e^30 = 1e13 is far above any useful loss and far below overflow."""

NEAR_CERTAIN = -1e-6
"""Largest per-token log-probability for odds; the log-odds there are 13.8."""


def capped_exp(x: Tensor, cap: float = EXP_CAP) -> Tensor:
    """e^x up to `cap`, its tangent above: increasing and convex everywhere, finite for any finite x."""
    return torch.exp(x.clamp(max=cap)) * (1 + (x - cap).clamp(min=0))


def capped_expm1(x: Tensor, cap: float = EXP_CAP) -> Tensor:
    """e^x - 1 up to `cap`, its tangent above; accurate near 0, where subtracting 1 from e^x loses everything."""
    return torch.expm1(x.clamp(max=cap)) + math.exp(cap) * (x - cap).clamp(min=0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012); x is clamped to at most `NEAR_CERTAIN`."""
    x = x.clamp(max=NEAR_CERTAIN)
    # Each branch gets values where it is finite: the gradient of the unused branch must not be NaN.
    near = torch.log(-torch.expm1(x.clamp(min=-math.log(2))))
    far = torch.log1p(-torch.exp(x.clamp(max=-math.log(2))))
    return torch.where(x > -math.log(2), near, far)


def log_odds(x: Tensor) -> Tensor:
    """log(p / (1 - p)) of a probability given as x = log p < 0."""
    return x.clamp(max=NEAR_CERTAIN) - log1mexp(x)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) means over the last axis of (N, T) `values` where `mask` is true; 0 for a row without any."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def numbered_generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends only on `numbers`, so that saving a count is enough to restore it."""
    state = 0
    for number in numbers:
        # One step of a 64-bit linear congruential generator mixes each number in.
        state = ((state ^ number) * 6364136223846793005 + 1442695040888963407) % 2**64
    return torch.Generator().manual_seed(state >> 1)
