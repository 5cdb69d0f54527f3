"""DiscoPOP (2406.08414): a loss with a hill in the middle, and what it does to a pair that stands there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from prefopt.losses import CELL, DPO, PFL, DiscoPOP, Loss, PreferenceBatch, Scores
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import descend, numbers

BETA = 0.05
Form = Literal["paper", "search", "repository"]


def pairs(x: Tensor, prefers_chosen: bool = True) -> PreferenceBatch:
    """Pairs with beta d = x at beta 0.05; `prefers_chosen` says what the policy alone prefers."""
    zero, one = torch.zeros_like(x), torch.ones(x.shape, dtype=torch.long)
    offset = 1e3 if prefers_chosen else -1e3
    return PreferenceBatch(
        chosen=Scores(x / BETA + offset, one, zero + offset), rejected=Scores(zero, one, zero.detach())
    )


def slope(loss: Loss, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.per_example(pairs(x)).sum(), x)
    return gradient


def root(f: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Where a function changes sign, by bisection."""
    sign = float(f(torch.tensor([low], dtype=torch.float64)))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float(f(torch.tensor([middle], dtype=torch.float64))) * sign > 0 else (low, middle)
        )
    return (low + high) / 2


def shape() -> list[Outcome]:
    loss = DiscoPOP(BETA, tau=0.05)
    valley, hill = root(lambda x: slope(loss, x), -0.3, 0.0), root(lambda x: slope(loss, x), 0.0, 0.3)
    at = loss.per_example(pairs(torch.tensor([valley, hill, 0.0], dtype=torch.float64)))
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    ours, dpo = slope(loss, grid), slope(DPO(BETA), grid)
    opposite = grid[ours * dpo < 0]
    inside = (grid > valley) & (grid < hill)
    return [
        Outcome(
            "stationary-points",
            f"minimum x = {valley:.4f} (d = {valley / BETA:.4f}), maximum x = {hill:.4f} (d = {hill / BETA:.4f}); "
            f"values there and at 0: {numbers(at, '.4f')}",
            numbers={"minimum": [valley / BETA], "maximum": [hill / BETA]},
            picture=Picture(
                "the loss of one pair, beta 0.05",
                "x = beta d",
                "loss",
                {name: near_start(objective) for name, objective in {"LRML": loss, "DPO": DPO(BETA)}.items()},
            ),
        ),
        Outcome(
            "opposite-gradient",
            f"opposite for x from {float(opposite.min()):.4f} to {float(opposite.max()):.4f}: the start, x = 0, too",
            bool(torch.equal(ours * dpo < 0, inside)),
        ),
        limits(loss),
        from_the_start(loss),
    ]


def near_start(loss: Loss) -> list[tuple[float, float]]:
    x = torch.linspace(-0.4, 0.4, 161, dtype=torch.float64)
    return list(zip(x.tolist(), loss.per_example(pairs(x)).tolist(), strict=True))


def limits(loss: Loss) -> Outcome:
    far = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    values = loss.per_example(pairs(far))
    expected = torch.stack([torch.nn.functional.softplus(-far[0]), torch.exp(-far[1])])
    errors = (values - expected).abs()
    return Outcome(
        "limits",
        f"difference at x = -2 and 2: {numbers(errors)}",
        bool((errors < 1e-12).all()),
    )


def mean_over_pairs(loss: Loss) -> Callable[[Tensor], Tensor]:
    def value(x: Tensor) -> Tensor:
        mean: Tensor = loss(pairs(x)).loss
        return mean

    return value


def from_the_start(loss: Loss) -> Outcome:
    """Every pair starts at x = 0, where policy and reference agree."""
    ends = {}
    for name, objective in (("LRML", loss), ("DPO", DPO(BETA))):
        path = descend(mean_over_pairs(objective), torch.zeros(1, dtype=torch.float64), 0.05, 2000)
        ends[name] = float(path[-1, 0])
    noise = torch.Generator().manual_seed(0)
    starts = 0.05 * torch.randn(10000, generator=noise, dtype=torch.float64)
    ended = {}
    for name, objective in (("LRML", loss), ("DPO", DPO(BETA))):
        # The mean over 10000 independent pairs shrinks each one's gradient by as much.
        path = descend(mean_over_pairs(objective), starts, 0.05 * 10000, 400)
        ended[name] = float((path[-1][starts.abs() < 0.1] < 0).double().mean())
    return Outcome(
        "pairs-pushed-below",
        f"a free pair from x = 0 ends at x = {ends['LRML']:.4f} (LRML), {ends['DPO']:.2f} (DPO); of 10000 free pairs "
        f"from N(0, 0.05^2) {ended['LRML']:.1%} (LRML), {ended['DPO']:.1%} (DPO) end below 0",
        ends["LRML"] < 0 < ends["DPO"] and ended["LRML"] > ended["DPO"],
        "each pair's x is free; gradient descent, step 0.05",
    )


def relatives() -> list[Outcome]:
    grid = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    gap = CELL(BETA).per_example(pairs(grid)) - DPO(BETA).per_example(pairs(grid))
    errors = {}
    forms: dict[Form, float] = {"paper": BETA / 0.05, "search": 1.0, "repository": BETA}
    for form, beta in forms.items():
        loss, y = PFL(BETA, form), grid * beta / BETA
        half = loss.per_example(pairs(grid)) / DPO(beta).per_example(pairs(grid))
        hinge = loss.per_example(pairs(grid, prefers_chosen=False)) - 2 * torch.relu(1 - y)
        errors[form] = float(torch.stack([(half - 0.5).abs(), hinge.abs()]).max())
    reach = {form: 1 / abs(float(slope(PFL(BETA, form), torch.zeros(1, dtype=torch.float64)))) for form in errors}
    return [
        Outcome(
            "cell-above-dpo",
            f"smallest difference for x in [-20, 20]: {float(gap.min()):.2g}",
            bool((gap > 0).all()),
        ),
        Outcome(
            "pfl-pieces",
            "largest error: "
            + "; ".join(f"{form} {error:.1g}" for form, error in errors.items())
            + f"; slope at x = 0, paper over repository: {reach['repository'] / reach['paper']:.4g}",
            max(errors.values()) < 1e-9 and abs(reach["repository"] / reach["paper"] - 20) < 1e-9,
        ),
    ]
