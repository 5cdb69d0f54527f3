"""HyPO (2406.01462): offline DPO lets mass leak to what no pair covers; an online reverse KL holds it back."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from prefopt.losses import DPO, KLOnline, PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import curve, descend, numbers, tabular_pairs

FEATURES = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
UNIFORM = torch.full((3,), -math.log(3), dtype=torch.float64)
Y1, Y2 = torch.tensor([0]), torch.tensor([1])


def exact_kl(logps: Tensor) -> Tensor:
    """KLOnline with every response once, weighted by its probability: its expectation instead of an estimate."""
    ones = torch.ones(len(logps), dtype=torch.long)
    columns = {"weight": logps.detach().exp() * len(logps)}
    return KLOnline("none")(PreferenceBatch(sampled=Scores(logps, ones, UNIFORM, columns=columns))).loss


def hybrid(logps: Tensor, beta: float, lam: float) -> Tensor:
    value: Tensor = DPO(beta)(tabular_pairs(logps, UNIFORM, Y1, Y2)).loss
    return value + lam * exact_kl(logps) if lam else value


def true_kl(logps: Tensor) -> float:
    return float((logps.exp() * (logps - UNIFORM)).sum())


@cache
def path_of(lam: float, steps: int) -> Tensor:
    """(steps + 1, 1) w of gradient descent from 0, beta 0.1."""
    return descend(
        lambda w: hybrid(torch.log_softmax(w * FEATURES, -1), 0.1, lam),
        torch.zeros(1, dtype=torch.float64),
        0.1,
        steps,
    )


def trained(lam: float, steps: int) -> tuple[float, float, float, float]:
    """w, pi(y3), KL to the reference, and the last change of w."""
    path = path_of(lam, steps)
    logps = torch.log_softmax(path[-1] * FEATURES, -1)
    return float(path[-1, 0]), float(logps[2].exp()), true_kl(logps), float(path[-1, 0] - path[-2, 0])


def coverage(steps: int = 10000) -> Outcome:
    rows = {lam: trained(lam, steps) for lam in (0.0, 0.1, 1.0)}
    shown = "; ".join(f"lambda {lam:g}: w {numbers(row[:3], '.4g')}" for lam, row in rows.items())
    w, uncovered, kl, _ = rows[1.0]
    return Outcome(
        "coverage",
        f"w, pi(y3), KL after {steps} steps. {shown}; log 3 = 1.0986",
        settings="gradient descent from 0, step 0.1",
        numbers={
            "pi(y3) at lambda 0": [rows[0.0][1]],
            "last change at lambda 0": [rows[0.0][3]],
            "pi(y3) at lambda 0.1": [rows[0.1][1]],
            "w at lambda 1": [w],
            "pi(y3) at lambda 1": [uncovered],
            "KL at lambda 1": [kl],
        },
        picture=Picture(
            "probability of the response that no pair mentions",
            "step",
            "pi(y3)",
            {
                f"lambda {lam:g}": curve(torch.softmax(path_of(lam, steps) * FEATURES, -1)[:, 2])
                for lam in (0.0, 0.1, 1.0)
            },
            log="x",
        ),
    )


def uniqueness() -> Outcome:
    """Policies over a table with one ratio of the two responses that the data covers."""
    values = []
    for free in (-5.0, 0.0, 5.0):
        logps = torch.log_softmax(torch.tensor([2.0, 1.0, free], dtype=torch.float64), -1)
        values.append(float(hybrid(logps, 0.1, 0.0)))
    ends: dict[float, list[Tensor]] = {0.0: [], 1.0: []}
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    both, share = (torch.tensor([0, 1]), torch.tensor([1, 0])), torch.tensor([0.7, 0.3], dtype=torch.float64)
    for lam, found in ends.items():
        for start in starts:

            def objective(logits: Tensor, lam: float = lam) -> Tensor:
                logps = torch.log_softmax(logits, -1)
                value: Tensor = DPO(0.1)(tabular_pairs(logps, UNIFORM, *both, share)).loss
                return value + lam * exact_kl(logps) if lam else value

            # KLOnline's value is not its gradient's integral, which a line search would need: plain descent.
            found.append(torch.softmax(descend(objective, start, 20.0 if lam == 0 else 2.0, 3000)[-1], -1))
    spread = {lam: float(torch.stack(found).std(0).max()) for lam, found in ends.items()}
    ratios = torch.stack([(p[0] / p[1]).log() for p in ends[0.0]])
    return Outcome(
        "uniqueness",
        f"DPO loss at three pi(y3): {numbers(values, '.10f')}. Trained from 5 starts, DPO: log pi(y1) / pi(y2) "
        f"{numbers(ratios, '.3f')}, pi(y3) {numbers([float(p[2]) for p in ends[0.0]], '.3f')}; "
        f"lambda 1: policies differ by {spread[1.0]:.1g}",
        max(values) - min(values) < 1e-12 and spread[1.0] < 1e-6 < 1e-2 < spread[0.0],
        "y1 preferred in 70% of the pairs, so that DPO has a minimiser; beta 0.1",
    )


def estimates(baseline: str, samples: int, batch: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard error over batches of the estimated gradient in the logits, and the exact gradient."""
    logits = (sharpness * torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64)).requires_grad_()
    reference = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.1, 0.9], dtype=torch.float64), -1)
    logps = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits, retain_graph=True)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logps.detach().exp(), samples, replacement=True, generator=generator).reshape(-1, batch)
    ones = torch.ones(batch, dtype=torch.long)
    found = []
    for rows in drawn:
        if baseline == "naive":
            value = (logps[rows] - reference[rows]).mean()
        else:
            value = KLOnline(baseline)(PreferenceBatch(sampled=Scores(logps[rows], ones, reference[rows]))).loss  # type: ignore[arg-type]
        found.append(torch.autograd.grad(value, logits, retain_graph=True)[0])
    table = torch.stack(found)
    return table.mean(0), table.std(0) / math.sqrt(len(table)), exact


def unbiased(samples: int = 100_000, batch: int = 20) -> list[Outcome]:
    found = {name: estimates(name, samples, batch) for name in ("none", "leave_one_out", "naive")}
    off = {name: float(((mean - exact) / error).abs().max()) for name, (mean, error, exact) in found.items()}
    naive, error, exact = found["naive"]
    spread = {name: [float(found[name][1].norm())] for name in ("none", "leave_one_out")}
    for name, errors in spread.items():
        errors.append(float(estimates(name, samples // 5, batch, sharpness=5.0)[1].norm()))
    return [
        Outcome(
            "unbiased",
            f"{samples} samples, largest distance from the exact gradient in standard errors: without the baseline "
            f"{off['none']:.2f}, with it {off['leave_one_out']:.2f}",
            off["none"] < 3 and off["leave_one_out"] < 3,
        ),
        Outcome(
            "baseline-variance",
            f"norm of its standard error, policy near the reference: {spread['none'][0]:.3g} without, "
            f"{spread['leave_one_out'][0]:.3g} with; far from it: {spread['none'][1]:.3g} without, "
            f"{spread['leave_one_out'][1]:.3g} with",
            all(a > b for a, b in zip(*spread.values(), strict=True)),
            f"four responses, logits (.3, -.8, 1.1, .2) and 5 times these, batches of {batch}",
        ),
        Outcome(
            "naive-gradient",
            f"mean gradient {numbers(naive)} (standard errors {numbers(error)}), exact {numbers(exact)}",
            bool((naive.abs() < 3 * error).all()) and off["naive"] > 3,
        ),
    ]


def preset() -> Outcome:
    loss = presets()["hypo"].build(lam=0.0)
    batch = tabular_pairs(torch.log_softmax(torch.tensor([1.0, 0.2, -1.0]), -1), UNIFORM.float(), Y1, Y2)
    sampled = Scores(torch.tensor([-1.0]), torch.ones(1, dtype=torch.long), torch.tensor([-2.0]))
    whole = loss(PreferenceBatch(batch.chosen, batch.rejected, sampled=sampled)).loss
    gap = float((whole - DPO(0.05)(batch).loss).abs())
    return Outcome("lambda-zero", f"difference {gap:.1g}", gap == 0.0)
