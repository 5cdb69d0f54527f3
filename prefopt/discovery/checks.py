"""What an expression must pass before any training: finite, pushing the right way, differentiable, new.

All in float64, at several betas, on a grid of margins that reaches 1000 on both sides.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prefopt.discovery.grammar import Node, evaluate

BETAS = (0.01, 0.1, 1.0)
REACH = 1000.0
"""Largest margin at which value and derivative must be finite."""

_NEAR = torch.arange(-80, 81, dtype=torch.float64) / 10
_FAR = torch.logspace(1, 3, 40, dtype=torch.float64)
GRID = torch.cat([-_FAR.flip(0), _NEAR, _FAR])
"""(241,) margins x, 0 among them."""

# Away from round numbers, where kinks are.
_POINTS = torch.tensor(
    [-37.31713, -2.61803, -0.73205, 0.14142, 0.61803, 1.73205, 3.14159, 41.4213], dtype=torch.float64
)
_FALLS = 1e-9
"""Smallest slope that counts as one."""


def slopes(node: Node, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(N,) values and derivatives for (N,) margins, each pair a batch of its own."""
    margins = x.detach().clone().unsqueeze(-1).requires_grad_()
    values = evaluate(node, margins, x.new_tensor(beta)).expand_as(margins)
    (slope,) = torch.autograd.grad(values.sum(), margins)
    return values.detach().squeeze(-1), slope.squeeze(-1)


def fault(node: Node, batchwise: bool = False) -> str | None:
    """Why an expression is no loss to train with; None if it passes.

    Args:
        node: the expression.
        batchwise: whether it may use statistics of the batch.
    """
    if node.batchwise and not batchwise:
        return "it uses statistics of the batch, which this search does not allow"
    for beta in BETAS:
        values, slope = slopes(node, GRID, beta)
        for what, numbers in (("value", values), ("derivative", slope)):
            if not bool(numbers.isfinite().all()):
                where = GRID[~numbers.isfinite()]
                return f"its {what} is not finite at x = {float(where[0]):g}, beta = {beta:g}"
        start = float(slope[GRID == 0][0])
        if not start < -_FALLS:
            return f"its slope at x = 0 is {start:.3g} at beta = {beta:g}: it does not push the chosen answer up"
    return _gradient_fault(node) or (None if node.batchwise else _batch_fault(node))


def _gradient_fault(node: Node) -> str | None:
    points = _POINTS.clone().requires_grad_()
    beta = points.new_tensor(0.1)

    def values(x: Tensor) -> Tensor:
        return evaluate(node, x, beta).expand_as(x)

    try:
        agrees = torch.autograd.gradcheck(values, points, eps=1e-6, atol=1e-5, rtol=1e-3, raise_exception=False)
    except RuntimeError as error:
        return f"its gradient cannot be computed: {str(error).splitlines()[0]}"
    return None if agrees else "its gradient disagrees with finite differences (gradcheck)"


def _batch_fault(node: Node) -> str | None:
    """A pair's value must not depend on the other pairs."""
    beta = _POINTS.new_tensor(0.1)
    whole = evaluate(node, _POINTS, beta).expand_as(_POINTS)
    alone = torch.cat([evaluate(node, x, beta).expand_as(x) for x in torch.split(_POINTS, 1)])
    return None if torch.allclose(whole, alone, rtol=1e-12, atol=1e-12) else "pairs of a batch act on one another"


def signature(node: Node) -> str:
    """Equal for expressions that train alike: the derivative on a grid, at each beta up to a positive factor.

    Neither a constant nor a factor changes what an Adam step does. Derivatives are compared to three digits.
    Statistics of the batch are those of the grid.
    """
    digits = hashlib.sha256()
    for beta in BETAS:
        x = GRID.clone().requires_grad_()
        (slope,) = torch.autograd.grad(evaluate(node, x, x.new_tensor(beta)).expand_as(x).sum(), x)
        scaled = slope / slope[GRID == 0].abs().clamp(min=1e-300)
        digits.update(",".join(f"{value:.2e}" if abs(value) > 1e-9 else "0" for value in scaled.tolist()).encode())
    return digits.hexdigest()[:16]
