"""ORPO and ASFT in two stages (2502.01237): identities between their losses, and pairs against points.

python scripts/claims/orpo_asft.py
"""

from __future__ import annotations

import torch
from _common import Claim, numbers, run
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses import ASFT, CPO, DPO, NCA, ORPO, APOZero, BCOPair, Hinge, Loss, PreferenceBatch, Scores, presets

PAPER = "Direct alignment algorithms 2502.01237"


def averaged(chosen: Tensor, rejected: Tensor) -> PreferenceBatch:
    """Pairs of one token, so that sums are averages."""
    one = torch.ones(len(chosen), dtype=torch.long)
    return PreferenceBatch(Scores(chosen, one), Scores(rejected, one))


def ratios(chosen: Tensor, rejected: Tensor) -> PreferenceBatch:
    """Pairs with the given log-ratios to a reference."""
    one, zero = torch.ones(len(chosen), dtype=torch.long), torch.zeros_like(chosen)
    return PreferenceBatch(Scores(chosen, one, zero), Scores(rejected, one, zero))


def identities(points: int = 400) -> list[Claim]:
    line = torch.linspace(-8, -0.01, points, dtype=torch.float64)
    w, l = (grid.flatten() for grid in torch.meshgrid(line, line, indexing="ij"))  # noqa: E741
    batch = averaged(w, l)
    asft, orpo = ASFT(1.0).per_example(batch), ORPO(1.0).per_example(batch)
    as_likelihoods = -w - torch.log1p(-l.exp())
    bridge = asft + torch.log(w.exp() + l.exp() - 2 * (w + l).exp())
    lam = 0.3
    one_stage = presets()["asft_paper"].build(lam=lam).per_example(batch)
    disguise = -(1 + lam) * w - lam * torch.log1p(-l.exp())

    def error(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    gaps = [error(asft, as_likelihoods), error(one_stage, disguise), error(orpo, bridge)]
    return [
        Claim(
            f"{PAPER}, section 3",
            "At beta 1 ASFT's alignment term is -a_w - log(1 - e^a_l), likelihood and unlikelihood; one-stage ASFT is "
            "-(1 + lambda) a_w - lambda log(1 - e^a_l)",
            f"largest error on a grid of a in [-8, -0.01]: {numbers(gaps[:2], '.1g')}",
            max(gaps[:2]) < 1e-9,
        ),
        Claim(
            f"{PAPER}, section 3",
            "ORPO's term is ASFT's plus log(e^a_w + e^a_l - 2 e^(a_w + a_l)), and never above it",
            f"largest error {gaps[2]:.1g}; largest ORPO - ASFT {float((orpo - asft).max()):.2g}",
            gaps[2] < 1e-9 and bool((orpo <= asft + 1e-12).all()),
        ),
    ]


def prompt_constant() -> Claim:
    generator = torch.Generator().manual_seed(0)
    w, l, c = 2 * torch.randn(3, 256, generator=generator, dtype=torch.float64)  # noqa: E741
    odds = {"orpo": ORPO(1.0), "asft": ASFT(1.0)}
    rest = {"dpo": DPO(1.0), "hinge": Hinge(1.0), "cpo": CPO(1.0)}
    rest |= {"bco_pair": BCOPair(1.0), "apo_zero": APOZero(1.0), "nca": NCA(1.0)}
    moved = {}
    for name, loss in {**rest, **odds}.items():
        # o(a) = s is a = log sigmoid(s): the score of the odds-based losses is log-odds, of the others a log-ratio.
        make = (lambda a, b: averaged(F.logsigmoid(a), F.logsigmoid(b))) if name in odds else ratios
        moved[name] = float((loss.per_example(make(w + c, l + c)) - loss.per_example(make(w, l))).abs().max())
    pairwise = ("dpo", "hinge", "cpo", "orpo")
    return Claim(
        f"{PAPER}, section 3",
        "Adding a constant of the prompt to both scores changes no pairwise loss and every pointwise one",
        "largest change: " + "; ".join(f"{name} {value:.1g}" for name, value in moved.items()),
        all((value < 1e-6) == (name in pairwise) for name, value in moved.items()),
    )


def small_beta() -> Claim:
    generator = torch.Generator().manual_seed(0)
    start = 2 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    cosines = {}
    for beta in (10.0, 1.0, 0.1, 0.01):
        gradients = []
        for loss in (ORPO(beta), ASFT(beta)):
            odds = start.clone().requires_grad_()
            value = loss(averaged(F.logsigmoid(odds[0]), F.logsigmoid(odds[1]))).loss
            gradients.append(torch.autograd.grad(value, odds)[0].flatten())
        cosines[beta] = float(F.cosine_similarity(*gradients, dim=0))
    return Claim(
        f"{PAPER}, theorem on small beta",
        "As beta goes to 0 ORPO's and ASFT's gradients point the same way",
        "cosine in the log-odds of 64 pairs: " + "; ".join(f"beta {b:g} {c:.6f}" for b, c in cosines.items()),
        sorted(cosines.values()) == list(cosines.values()) and cosines[0.01] > 0.999,
    )


# ------------------------------------------------------------------------------------- pairs, points and prompt bias


def teacher(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) outputs of a random tanh network, scaled to mean 0 and deviation 1."""
    first = torch.randn(inputs.shape[1], 32, generator=generator) / inputs.shape[1] ** 0.5
    second = torch.randn(32, generator=generator)
    values = torch.tanh(2 * inputs @ first) @ second
    return (values - values.mean()) / values.std()


class Learner(torch.nn.Module):
    """S networks of one hidden layer side by side: (S, N, 16) -> (S, N), zero before training."""

    def __init__(self, seeds: int, width: int, generator: torch.Generator):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(seeds, 16, width, generator=generator) / 4)
        self.shift = torch.nn.Parameter(torch.zeros(seeds, 1, width))
        self.second = torch.nn.Parameter(torch.zeros(seeds, width, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return (torch.relu(inputs @ self.first + self.shift) @ self.second).squeeze(-1)


def ranking_accuracy(
    loss: Loss, width: int, bias: float, seeds: int, steps: int, count: int = 1000
) -> tuple[float, float]:
    """Share of pairs ranked by quality, held-out and training, for a score that starts as bias(prompt)."""
    chosen, rejected, offsets = [], [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        prompts, first, second = torch.randn(3, 2 * count, 8, generator=generator)
        inputs = [torch.cat([prompts, answers], 1) for answers in (first, second)]
        quality = teacher(torch.cat(inputs), generator).reshape(2, -1)
        better = (quality[0] > quality[1]).unsqueeze(1)
        chosen.append(torch.where(better, inputs[0], inputs[1]))
        rejected.append(torch.where(better, inputs[1], inputs[0]))
        offsets.append(bias * teacher(prompts, generator))
    w, l, b = torch.stack(chosen), torch.stack(rejected), torch.stack(offsets)  # noqa: E741
    learner = Learner(seeds, width, torch.Generator().manual_seed(seeds))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = ((learner(side[:, :count]) + b[:, :count]).flatten() for side in (w, l))
        loss(ratios(*scores)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = (learner(w) > learner(l)).float()
    return float(right[:, count:].mean()), float(right[:, :count].mean())


def pairs_and_points(steps: int = 1000, seeds: int = 5) -> list[Claim]:
    widths = (4, 16, 64)
    gaps: dict[tuple[int, float], tuple[float, float]] = {}
    shown = []
    for width in widths:
        for bias in (0.0, 1.0, 10.0) if width == 4 else (0.0, 10.0):
            pairwise = ranking_accuracy(DPO(1.0), width, bias, seeds, steps)
            pointwise = ranking_accuracy(BCOPair(1.0), width, bias, seeds, steps)
            gaps[width, bias] = 100 * (pairwise[0] - pointwise[0]), 100 * (pairwise[1] - pointwise[1])
            shown.append(f"width {width}, bias {bias:g}: {pairwise[0]:.1%} / {pointwise[0]:.1%}")
    chosen = (
        "the score starts as the prompt's bias (deviation 0, 1 or 10; quality's is 1), a ReLU network of the given "
        "width learns the rest from 1000 pairs; teachers are random tanh networks; logistic losses, Adam, lr 0.01, "
        f"{steps} full-batch steps, mean of {seeds} seeds"
    )
    source = f"{PAPER}, section on the toy example (our reading)"
    by_bias, by_width = [gaps[4, b] for b in (10.0, 1.0, 0.0)], [gaps[w, 10.0] for w in widths]
    without = [gaps[w, 0.0][0] for w in widths]

    def both(found: list[tuple[float, float]]) -> str:
        held_out, training = zip(*found, strict=True)
        return f"{numbers(list(held_out), '.1f')} (on the training pairs {numbers(list(training), '.1f')})"

    return [
        Claim(
            source,
            "With a large prompt bias and a narrow model pairwise training ranks better by 3 points or more",
            f"held-out accuracy pairwise / pointwise: {'; '.join(shown)}",
            gaps[4, 10.0][0] >= 3,
            chosen,
        ),
        Claim(
            source,
            "The gap closes, to less than 3 points, as the bias goes to 0",
            f"points at width 4, bias 10, 1, 0: {both(by_bias)}",
            by_bias[0][0] > by_bias[1][0] > by_bias[2][0] and abs(by_bias[2][0]) < 3,
            chosen,
        ),
        Claim(
            source,
            "The gap closes, to less than 3 points, as the width grows",
            f"points at bias 10, width {', '.join(map(str, widths))}: {both(by_width)}; at bias 0: "
            f"{numbers(without, '.1f')}",
            by_width[-1][0] < by_width[0][0] and abs(by_width[-1][0]) < 3,
            chosen,
        ),
    ]


def claims() -> list[Claim]:
    return [*identities(), prompt_constant(), small_beta(), *pairs_and_points()]


if __name__ == "__main__":
    run(__doc__, claims)
