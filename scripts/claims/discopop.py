"""DiscoPOP (2406.08414): a loss with a hill in the middle, and what it does to a pair that stands there.

python scripts/claims/discopop.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _common import Claim, descend, numbers, run
from torch import Tensor

from prefopt.losses import CELL, DPO, PFL, DiscoPOP, Loss, PreferenceBatch, Scores

PAPER = "DiscoPOP 2406.08414"
BETA = 0.05


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


def shape() -> list[Claim]:
    loss = DiscoPOP(BETA, tau=0.05)
    valley, hill = root(lambda x: slope(loss, x), -0.3, 0.0), root(lambda x: slope(loss, x), 0.0, 0.3)
    at = loss.per_example(pairs(torch.tensor([valley, hill, 0.0], dtype=torch.float64)))
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    ours, dpo = slope(loss, grid), slope(DPO(BETA), grid)
    opposite = grid[ours * dpo < 0]
    inside = (grid > valley) & (grid < hill)
    return [
        Claim(
            f"{PAPER}, section 5",
            "LRML at tau 0.05 has a local minimum at x = -0.1186 (d = -2.3714) and a local maximum at x = 0.0720 "
            "(d = 1.4401), x = beta d, beta = 0.05",
            f"minimum x = {valley:.4f} (d = {valley / BETA:.4f}), maximum x = {hill:.4f} (d = {hill / BETA:.4f}); "
            f"values there and at 0: {numbers(at, '.4f')}",
            abs(valley / BETA + 2.3714) < 1e-3 and abs(hill / BETA - 1.4401) < 1e-3,
        ),
        Claim(
            f"{PAPER}, derived",
            "Between the two its gradient has the opposite sign of DPO's, and nowhere else",
            f"opposite for x from {float(opposite.min()):.4f} to {float(opposite.max()):.4f}: the start, x = 0, too",
            bool(torch.equal(ours * dpo < 0, inside)),
        ),
        limits(loss),
        from_the_start(loss),
    ]


def limits(loss: Loss) -> Claim:
    far = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    values = loss.per_example(pairs(far))
    expected = torch.stack([torch.nn.functional.softplus(-far[0]), torch.exp(-far[1])])
    errors = (values - expected).abs()
    return Claim(
        f"{PAPER}, eq. 5",
        "Far to the left LRML is the logistic loss, far to the right the exponential",
        f"difference at x = -2 and 2: {numbers(errors)}",
        bool((errors < 1e-12).all()),
    )


def from_the_start(loss: Loss) -> Claim:
    """Every pair starts at x = 0, where policy and reference agree."""
    ends = {}
    for name, objective in (("LRML", loss), ("DPO", DPO(BETA))):
        path = descend(lambda x, o=objective: o(pairs(x)).loss, torch.zeros(1, dtype=torch.float64), 0.05, 2000)
        ends[name] = float(path[-1, 0])
    noise = torch.Generator().manual_seed(0)
    starts = 0.05 * torch.randn(10000, generator=noise, dtype=torch.float64)
    ended = {}
    for name, objective in (("LRML", loss), ("DPO", DPO(BETA))):
        # The mean over 10000 independent pairs shrinks each one's gradient by as much.
        path = descend(lambda x, o=objective: o(pairs(x)).loss, starts, 0.05 * 10000, 400)
        ended[name] = float((path[-1][starts.abs() < 0.1] < 0).double().mean())
    return Claim(
        f"{PAPER}, derived",
        "Of pairs that start at |x| < 0.1 more end at x < 0 under LRML than under DPO",
        f"a free pair from x = 0 ends at x = {ends['LRML']:.4f} (LRML), {ends['DPO']:.2f} (DPO); of 10000 free pairs "
        f"from N(0, 0.05^2) {ended['LRML']:.1%} (LRML), {ended['DPO']:.1%} (DPO) end below 0",
        ends["LRML"] < 0 < ends["DPO"] and ended["LRML"] > ended["DPO"],
        "each pair's x is free; gradient descent, step 0.05",
    )


def relatives() -> list[Claim]:
    grid = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    gap = CELL(BETA).per_example(pairs(grid)) - DPO(BETA).per_example(pairs(grid))
    errors = {}
    for form, beta in (("paper", BETA / 0.05), ("search", 1.0), ("repository", BETA)):
        loss, y = PFL(BETA, form), grid * beta / BETA
        half = loss.per_example(pairs(grid)) / DPO(beta).per_example(pairs(grid))
        hinge = loss.per_example(pairs(grid, prefers_chosen=False)) - 2 * torch.relu(1 - y)
        errors[form] = float(torch.stack([(half - 0.5).abs(), hinge.abs()]).max())
    reach = {form: 1 / abs(float(slope(PFL(BETA, form), torch.zeros(1, dtype=torch.float64)))) for form in errors}
    return [
        Claim(
            f"{PAPER}, derived",
            "CELL's loss is above DPO's everywhere",
            f"smallest difference for x in [-20, 20]: {float(gap.min()):.2g}",
            bool((gap > 0).all()),
        ),
        Claim(
            f"{PAPER}, derived",
            "PFL is half of DPO's loss at beta / 0.05 where the policy prefers the chosen answer, twice the hinge "
            "elsewhere; at beta 0.05 the paper's form is what the search wrote, and the repository's has a twentieth "
            "of its slope",
            "largest error: "
            + "; ".join(f"{form} {error:.1g}" for form, error in errors.items())
            + f"; slope at x = 0, paper over repository: {reach['repository'] / reach['paper']:.4g}",
            max(errors.values()) < 1e-9 and abs(reach["repository"] / reach["paper"] - 20) < 1e-9,
        ),
    ]


def claims() -> list[Claim]:
    return [*shape(), *relatives()]


if __name__ == "__main__":
    run(__doc__, claims)
