"""RPO (2405.16436) and its kin: a likelihood term keeps the chosen answers up and mass off what no pair covers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.losses import DPO, DPOP, SFT, Loss, PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.addition import base_model, copy_of, draw_pairs
from prefopt.reproduction.experiments.irpo import fresh
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import curve, descend, numbers, tabular_pairs
from prefopt.reproduction.experiments.tiny_lm import log_ratios, train


def rpo(beta: float, eta: float) -> Loss:
    return presets()["rpo"].build(beta=beta, eta=eta)


def gradient_ratio() -> Outcome:
    beta, eta = 0.1, 0.005
    d = torch.linspace(-50, 100, 31, dtype=torch.float64)
    chosen, rejected = d.clone().requires_grad_(), torch.zeros_like(d).requires_grad_()
    one, zero = torch.ones(len(d), dtype=torch.long), torch.zeros_like(d)
    value = rpo(beta, eta)(PreferenceBatch(Scores(chosen, one, zero), Scores(rejected, one, zero))).loss
    up, down = torch.autograd.grad(value, (chosen, rejected))
    ratio = up.abs() / down.abs()
    error = float((ratio - (1 + eta / torch.sigmoid(-beta * d))).abs().max())
    shown = ratio[[0, 10, 20, 30]]
    return Outcome(
        "push-ratio",
        f"beta 0.1, eta 0.005, d = -50, 0, 50, 100: {numbers(shown, '.4f')}; largest error {error:.1g}",
        error < 1e-9 and bool((ratio > 1).all()) and bool((ratio.diff() > 0).all()),
    )


def uncovered_arm(steps: int = 20000) -> list[Outcome]:
    """Logits w * (1, 0, 2): what raises y1 over y2 raises y3, which no pair mentions, even more."""
    features = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    uniform = torch.full((3,), -math.log(3), dtype=torch.float64)
    pair = torch.tensor([0]), torch.tensor([1])
    mass, lines = {}, {}
    for name, loss in {"DPO": DPO(0.1), **{f"RPO eta {eta:g}": rpo(0.1, eta) for eta in (0.005, 0.1, 1.0)}}.items():

        def objective(w: Tensor, loss: Loss = loss) -> Tensor:
            value: Tensor = loss(tabular_pairs(torch.log_softmax(w * features, -1), uniform, *pair)).loss
            return value

        path = descend(objective, torch.zeros(1, dtype=torch.float64), lr=0.5, steps=steps)
        logps = torch.log_softmax(path[-1] * features, -1)
        lines[name] = curve(torch.softmax(path * features, -1)[:, 2])
        mass[name] = float(-torch.expm1(torch.logsumexp(logps[:2], 0)))  # 1 - (y1 + y2), where it is near 1
    settings = "three responses with logits w * (1, 0, 2), one pair y1 > y2, beta 0.1, gradient descent, step 0.5"
    return [
        Outcome(
            "uncovered-mass",
            f"pi(y3) after {steps} steps: " + "; ".join(f"{name} {value:.6f}" for name, value in mass.items()),
            settings=settings,
            numbers={"DPO less RPO": [mass["DPO"] - mass["RPO eta 1"]]},
            picture=Picture("mass on the uncovered response", "step", "pi(y3)", lines, log="x"),
        ),
        Outcome(
            "uncovered-mass-paper-eta",
            "same runs",
            settings=settings,
            numbers={"DPO less RPO": [mass["DPO"] - mass["RPO eta 0.005"]]},
        ),
    ]


def chosen_log_ratios(problems: int = 500) -> list[Outcome]:
    base = base_model()
    pairs = draw_pairs(base, fresh(0, problems), 30, 10, 0.8, seed=0).pairs
    held_out = draw_pairs(base, fresh(4, problems // 2), 30, 4, 0.8, seed=5).pairs
    losses = {
        "DPO": DPO(0.1),
        "RPO": rpo(0.1, 0.005),
        "RPO average": DPO(0.1) + 0.2 * SFT("token"),
        "IRPO": presets()["irpo"].build(),
        "DPOP": DPOP(0.1, 50.0),
    }
    up, accuracy, lines = {}, {}, []
    for name, loss in losses.items():
        model = train(copy_of(base), pairs, loss, lr=3e-4, steps=max(1, 2 * len(pairs) // 64))
        u_w, u_l = log_ratios(model, held_out)
        up[name], accuracy[name] = float(u_w.mean()), float((u_w > u_l).float().mean())
        lines.append(f"{name} {up[name]:+.3f} / {float(u_l.mean()):+.2f} / {accuracy[name]:.1%}")
    measured = f"held-out log-ratio chosen / rejected / accuracy: {'; '.join(lines)}"
    settings = (
        "two-digit addition, a GRU's own samples as pairs (as in irpo.py), beta 0.1, eta 0.005, Adam, lr 3e-4, "
        "2 epochs of 64 pairs"
    )

    def better(name: str) -> bool:
        return up[name] > up["DPO"] and accuracy["DPO"] - accuracy[name] < 0.05

    return [
        Outcome(
            "chosen-likelihood",
            measured,
            better("RPO"),
            settings,
        ),
        Outcome(
            "irpo-likelihood",
            "same runs",
            better("IRPO") and better("RPO average"),
            settings,
        ),
        Outcome(
            "dpop-likelihood",
            "same runs",
            better("DPOP") and up["DPOP"] > -0.1,
            f"{settings}; about 0: above -0.1 nats",
        ),
    ]
