"""Policies small enough to be a table of responses, and how they are trained to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prefopt.losses import Loss, PreferenceBatch, Scores


def tabular_pairs(
    logps: Tensor,
    ref_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    weight: Tensor | None = None,
    prev_logps: Tensor | None = None,
) -> PreferenceBatch:
    """Pairs of a policy over K responses of one token each.

    Args:
        logps: (K,) log-probabilities of the policy.
        ref_logps: (K,) of the reference.
        chosen: (N,) numbers of the preferred responses.
        rejected: (N,) numbers of the other ones.
        weight: (N,) how often each pair is seen, for an expectation over pairs; sums to 1.
        prev_logps: (K,) of the previous iterate.
    """
    # A loss is a mean over rows: weights that sum to the number of rows turn it into the expectation.
    columns = {} if weight is None else {"weight": weight * len(chosen)}

    def scores(numbers: Tensor) -> Scores:
        return Scores(
            logps=logps[numbers],
            lengths=torch.ones_like(numbers),
            ref_logps=ref_logps[numbers],
            prev_logps=None if prev_logps is None else prev_logps[numbers],
            columns=columns,
        )

    return PreferenceBatch(chosen=scores(chosen), rejected=scores(rejected))


def ordered_pairs(count: int) -> tuple[Tensor, Tensor]:
    """All (i, j) with i != j below `count`."""
    first, second = (~torch.eye(count, dtype=torch.bool)).nonzero(as_tuple=True)
    return first, second


def minimise(objective: Callable[[Tensor], Tensor], start: Tensor, rounds: int = 20) -> Tensor:
    """The parameters at a minimum of a smooth objective, by L-BFGS in float64."""
    parameters = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(parameters)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(rounds):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameters.detach()


def descend(objective: Callable[[Tensor], Tensor], start: Tensor, lr: float, steps: int) -> Tensor:
    """(steps + 1, ...) the path of plain gradient descent, its start included."""
    parameters = start.detach().clone()
    path = [parameters.clone()]
    for _ in range(steps):
        parameters.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(parameters), parameters)
        parameters = parameters.detach() - lr * gradient
        path.append(parameters.clone())
    return torch.stack(path)


def bradley_terry_optimum(loss: Loss, rewards: Tensor, ref_logps: Tensor, start: Tensor | None = None) -> Tensor:
    """(K,) log-probabilities that minimise a loss over all pairs, labelled by Bradley-Terry with `rewards`."""
    chosen, rejected = ordered_pairs(len(rewards))
    weight = torch.sigmoid(rewards[chosen] - rewards[rejected])
    weight = weight / weight.sum()

    def objective(logits: Tensor) -> Tensor:
        logps = torch.log_softmax(logits, -1)
        value: Tensor = loss(tabular_pairs(logps, ref_logps, chosen, rejected, weight)).loss
        return value

    return torch.log_softmax(minimise(objective, ref_logps if start is None else start), -1)


def total_variation(logps: Tensor, other: Tensor) -> float:
    return float((logps.exp() - other.exp()).abs().sum() / 2)


def entropy(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(-1)


def curve(path: Tensor, points: int = 200) -> list[tuple[float, float]]:
    """(step, value) of a path of scalars, thinned to about `points`, denser at the beginning."""
    last = len(path) - 1
    steps = {round(last ** (number / points)) for number in range(points + 1)} | {0, last}
    return [(float(step), float(path[step])) for step in sorted(steps)]


def numbers(values: Tensor | Sequence[float], form: str = ".3g") -> str:
    """Values in one line, for the column of what was measured."""
    return ", ".join(format(float(value), form) for value in values)
