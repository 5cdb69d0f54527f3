"""How far a model has moved from its start, on completion tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from prefopt.evaluation.arrays import Array
from prefopt.safety.errors import UsageError

TOLERANCE = 1e-2
"""How far the probabilities of a position may be from summing to 1: half precision rounds."""


def kl_to_start(
    logps: Array,
    start_logps: Array,
    completion_mask: Array | None = None,
    direction: Literal["forward", "reverse"] = "forward",
) -> float:
    """Mean over completion positions of the KL between the model and the model before unlearning, in nats.

    Args:
        logps: (T, V) or (N, T, V) log-probabilities of the whole vocabulary, position t the distribution of token t.
        start_logps: the same of the model before unlearning.
        completion_mask: (T,) or (N, T), true at completion tokens; all positions if None. Without prompt and padding,
            whose divergence says nothing about answers.
        direction: "forward" is KL(start || model), as in the NPO paper's appendix B; "reverse" KL(model || start).

    Reference: Zhang et al. 2024 (NPO), arXiv 2404.05868, appendix B.
    """
    if direction not in ("forward", "reverse"):
        raise UsageError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    model, start = torch.as_tensor(logps), torch.as_tensor(start_logps)
    if model.shape != start.shape or model.dim() not in (2, 3):
        shapes = f"{tuple(model.shape)} and {tuple(start.shape)}"
        raise UsageError(f"logps and start_logps must both have shape (T, V) or (N, T, V), got {shapes}")
    mask = torch.ones(model.shape[:-1], dtype=torch.bool)
    if completion_mask is not None:
        mask = torch.as_tensor(completion_mask).bool()
    if mask.shape != model.shape[:-1]:
        raise UsageError(f"completion_mask must have shape {tuple(model.shape[:-1])}, got {tuple(mask.shape)}")
    if not bool(mask.any()):
        raise UsageError("completion_mask has no completion token")
    ours = _distributions("logps", model, mask)
    theirs = _distributions("start_logps", start, mask)
    first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
    terms = first.exp() * (first - second)
    # A token that is impossible under the first adds nothing.
    return float(terms.masked_fill(first == -np.inf, 0).sum(-1).mean())


def _distributions(name: str, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(M, V) of the masked positions, in float64."""
    picked = values.detach()[mask.to(values.device)].double().cpu()
    sums = picked.logsumexp(-1)
    if bool(sums.isnan().any()):
        raise UsageError(f"{name} holds NaN: a model whose weights or logits are not finite gives this")
    if bool((sums.abs() > TOLERANCE).any()):
        raise UsageError(f"{name} must be log-probabilities over the vocabulary; apply log_softmax to logits first")
    return picked
