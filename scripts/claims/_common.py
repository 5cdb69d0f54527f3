"""What the claim scripts share: a claim and its outcome, how it is printed, and policies small enough to be a table.

A claim is a sentence from a paper that a small experiment can agree or disagree with. Every experiment trains with the
losses of `prefopt.losses` as they ship.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from prefopt.losses import Loss, PreferenceBatch, Scores


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper and what came of it here.

    Attributes:
        source: paper, arXiv id and place; "derived" where the sentence follows from the formula alone.
        claim: what should hold.
        measured: the numbers that decide.
        holds: the outcome.
        settings: what the text leaves open and was chosen here before the first run, or "".
    """

    source: str
    claim: str
    measured: str
    holds: bool
    settings: str = ""


def show(claims: list[Claim], title: str, seconds: float) -> None:
    table = Table(title=f"{title} ({seconds:.0f} s)", show_lines=True)
    for column in ("claim", "measured"):
        table.add_column(column, overflow="fold", ratio=1)
    table.add_column("outcome", min_width=8)
    for claim in claims:
        outcome = "[green]holds[/]" if claim.holds else "[red]does not hold[/]"
        settings = f"\n[dim]chosen here: {escape(claim.settings)}[/]" if claim.settings else ""
        text = f"[dim]{escape(claim.source)}[/]\n{escape(claim.claim)}{settings}"
        table.add_row(text, escape(claim.measured), outcome)
    Console().print(table)


def run(title: str, experiment: Callable[[], list[Claim]]) -> None:
    """The command line of a claim script: run the experiment, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims and their outcomes here as well")
    args = parser.parse_args()
    started = time.monotonic()
    claims = experiment()
    seconds = time.monotonic() - started
    show(claims, title.strip().splitlines()[0], seconds)
    if args.json:
        report = {"title": title, "seconds": round(seconds, 1), "claims": [asdict(claim) for claim in claims]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- tabular policies


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
        value.backward()
        return value

    for _ in range(rounds):
        optimizer.step(closure)
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


def numbers(values: Tensor | list[float], form: str = ".3g") -> str:
    """Values in one line, for the column of what was measured."""
    return ", ".join(format(float(value), form) for value in values)
