"""How strongly a loss pushes the chosen log-probability of a pair up, and the rejected one down.

Imports losses alone.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from prefopt.losses import ConflictFree, Loss, PreferenceBatch, Scores
from prefopt.losses.needs import QUANTITIES
from prefopt.losses.scores import Role
from prefopt.safety.errors import UsageError


def refuse_unpushable(loss: Loss) -> None:
    """Refuse losses whose gradient does not reach the model through the answers' log-probabilities alone.

    Raises:
        UsageError: naming what else the loss reads.
    """
    other = [
        str(need.name).lower()
        for need, quantity in QUANTITIES.items()
        if need in loss.needs and set(quantity.gradient) - {"token_logps"}
    ]
    if loss.grouped:
        reason = "it is about groups of answers"
    elif isinstance(loss, ConflictFree):
        reason = "it combines the gradients of its terms, which are not those of their sum"
    elif not {"chosen", "rejected"}.intersection(loss.roles) or "sampled" in loss.roles:
        reason = "it trains on sampled answers"
    elif other:
        reason = f"its gradient also comes from {', '.join(other)}"
    else:
        return
    raise UsageError(
        f"gradient entanglement is about losses on the log-probabilities of chosen and rejected answers, and {loss} "
        f"is not one: {reason}"
    )


def pushes(loss: Loss, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """The derivatives of each pair's loss for its two log-probabilities, by autograd.

    A descent step on the loss raises `log pi(chosen)` by `d_w` and lowers `log pi(rejected)` by `d_l`, each times the
    step size, if these two could be changed alone. A negative value pushes the other way.

    Args:
        loss: any that `refuse_unpushable` accepts. Its buffers do not change.
        batch: N scored pairs, with or without gradient.

    Returns:
        d_w and d_l, (N,) float64 each; 0 for a role that the loss does not read. Of a loss that weights the tokens of
        an answer, the mean of their derivatives. Of `pair_normalized`, before they are divided by gradients' norms.

    Raises:
        UsageError: of `refuse_unpushable`.
        LossError: if the batch lacks what the loss needs.

    Reference: Yuan et al. 2024, arXiv 2410.13828, section 3 and table 1 (d_w, d_l).
    """
    refuse_unpushable(loss)
    chosen, rejected = batch.chosen, batch.rejected
    if chosen is None or rejected is None:
        raise UsageError("the pushes of a loss are about pairs; this batch lacks the chosen or the rejected answers")
    frozen = copy.deepcopy(loss).eval()
    scored = {role.field: batch.role(role.field) for role in Role}
    exact: dict[str, Any] = {name: _exact(scores) for name, scores in scored.items() if scores is not None}
    with torch.enable_grad():
        value = frozen(replace(batch, **exact)).loss
    return -_derivative(value, exact["chosen"]), _derivative(value, exact["rejected"])


def _exact(scores: Scores) -> Scores:
    """The scores detached, in float64, with log-probabilities that derivatives can be taken for.

    In float32 where the device has nothing wider (Apple's).
    """
    dtype = torch.float32 if scores.logps.device.type == "mps" else torch.float64
    values: dict[str, Any] = {
        field.name: value.detach().to(dtype)
        for field in fields(scores)
        if isinstance(value := getattr(scores, field.name), Tensor) and value.is_floating_point()
    }
    for name in ("logps", "token_logps"):
        if name in values:
            values[name].requires_grad_()
    return replace(scores, **values)


def _derivative(value: Tensor, scores: Scores) -> Tensor:
    """(N,) derivatives for the log-probabilities, each of its own pair's loss and not of the batch's mean."""
    leaves = [leaf for leaf in (scores.logps, scores.token_logps) if leaf is not None]
    total = torch.zeros_like(scores.logps)
    if value.requires_grad:
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        for slope in slopes:
            if slope is not None:
                # Each token of an answer moves by the same part of the change of its log-probability.
                total = total + (slope if slope.dim() == 1 else slope.sum(-1) / scores.lengths.clamp(min=1))
    return (len(scores) * total).detach().double().cpu()
