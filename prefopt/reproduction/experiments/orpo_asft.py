"""ORPO and ASFT in two stages (2502.01237): identities between their losses, and pairs against points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses import ASFT, CPO, DPO, NCA, ORPO, APOZero, BCOPair, Hinge, Loss, PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import numbers


def averaged(chosen: Tensor, rejected: Tensor) -> PreferenceBatch:
    """Pairs of one token, so that sums are averages."""
    one = torch.ones(len(chosen), dtype=torch.long)
    return PreferenceBatch(Scores(chosen, one), Scores(rejected, one))


def ratios(chosen: Tensor, rejected: Tensor) -> PreferenceBatch:
    """Pairs with the given log-ratios to a reference."""
    one, zero = torch.ones(len(chosen), dtype=torch.long), torch.zeros_like(chosen)
    return PreferenceBatch(Scores(chosen, one, zero), Scores(rejected, one, zero))


def identities(points: int = 400) -> list[Outcome]:
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
        Outcome(
            "asft-identity",
            f"largest error on a grid of a in [-8, -0.01]: {numbers(gaps[:2], '.1g')}",
            max(gaps[:2]) < 1e-9,
        ),
        Outcome(
            "orpo-bound",
            f"largest error {gaps[2]:.1g}; largest ORPO - ASFT {float((orpo - asft).max()):.2g}",
            gaps[2] < 1e-9 and bool((orpo <= asft + 1e-12).all()),
        ),
    ]


def prompt_constant() -> Outcome:
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
    return Outcome(
        "prompt-constant",
        "largest change: " + "; ".join(f"{name} {value:.1g}" for name, value in moved.items()),
        all((value < 1e-6) == (name in pairwise) for name, value in moved.items()),
    )


def small_beta() -> Outcome:
    generator = torch.Generator().manual_seed(0)
    start = 2 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    cosines = {}
    for beta in (10.0, 1.0, 0.1, 0.01):
        gradients: list[Tensor] = []
        for loss in (ORPO(beta), ASFT(beta)):
            odds = start.clone().requires_grad_()
            value = loss(averaged(F.logsigmoid(odds[0]), F.logsigmoid(odds[1]))).loss
            gradients.append(torch.autograd.grad(value, odds)[0].flatten())
        cosines[beta] = float(F.cosine_similarity(gradients[0], gradients[1], dim=0))
    return Outcome(
        "small-beta",
        "cosine in the log-odds of 64 pairs: " + "; ".join(f"beta {b:g} {c:.6f}" for b, c in cosines.items()),
        sorted(cosines.values()) == list(cosines.values()) and cosines[0.01] > 0.999,
        picture=Picture(
            "ORPO's and ASFT's gradients",
            "beta",
            "cosine",
            {"64 pairs": list(cosines.items())},
            log="x",
        ),
    )


# ------------------------------------------------------------------------------------- pairs, points and prompt bias

WIDTHS = (1, 2, 3, 4, 6, 8)
RATES = (0.3, 0.1, 0.05, 0.03, 0.01, 0.005, 0.003)
TOY = (
    "the paper's toy (appendix F): 2000 prompts x, 80% to train on; two answers with scores from U(0, 1), centred for "
    "each prompt, and 0.9 (or 0) added to both where x < 0.5; the higher one is chosen. A ReLU network of one hidden "
    "layer reads x and the answer's score with what was added (our reading of its y); logistic losses, beta 1, 100 "
    "epochs; each width at the best of the paper's seven learning rates by held-out accuracy. Chosen here: Adam, "
    "batches of 100, "
)


class Learner(torch.nn.Module):
    """S networks of one hidden layer side by side: (S, N, 2) -> (S, N)."""

    def __init__(self, networks: int, width: int, generator: torch.Generator):
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(networks, 2, width, generator=generator) / 2**0.5)
        self.shift = torch.nn.Parameter(torch.zeros(networks, 1, width))
        self.second = torch.nn.Parameter(torch.randn(networks, width, 1, generator=generator) / width**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return (torch.relu(inputs @ self.first + self.shift) @ self.second).squeeze(-1)


def toy_pairs(strength: float, seeds: int, count: int = 2000) -> tuple[Tensor, Tensor]:
    """(S, N, 2) what the network reads of the chosen and of the rejected answers."""
    generator = torch.Generator().manual_seed(0)
    x, *scores = torch.rand(3, seeds, count, generator=generator)
    middle = (scores[0] + scores[1]) / 2
    better, worse = torch.maximum(*scores) - middle, torch.minimum(*scores) - middle
    bias = strength * (x < 0.5)
    return torch.stack([x, better + bias], -1), torch.stack([x, worse + bias], -1)


def ranked(loss: Loss, width: int, strength: float, seeds: int, epochs: int = 100) -> tuple[float, float]:
    """Share of held-out pairs ranked right, and how alike the two scores of a prompt are (ICC1), at the best rate."""
    w, l = (side.repeat(len(RATES), 1, 1) for side in toy_pairs(strength, seeds))  # noqa: E741
    networks, count = w.shape[:2]
    learner = Learner(networks, width, torch.Generator().manual_seed(1))
    # One optimizer for all: Adam ignores the scale of a gradient, and each network has its own rate.
    rates = torch.tensor(RATES).repeat_interleave(seeds)[:, None, None]
    optimizer = torch.optim.Adam(learner.parameters(), lr=1.0)
    order = torch.Generator().manual_seed(2)
    train = count * 4 // 5
    for _ in range(epochs):
        for batch in torch.randperm(train, generator=order).split(100):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss(ratios(learner(w[:, batch]).flatten(), learner(l[:, batch]).flatten())).loss.backward()  # type: ignore[no-untyped-call]
            before = [parameter.detach().clone() for parameter in learner.parameters()]
            optimizer.step()
            with torch.no_grad():
                for old, parameter in zip(before, learner.parameters(), strict=True):
                    parameter.copy_(old + rates * (parameter - old))
    with torch.no_grad():
        up, down = learner(w[:, train:]), learner(l[:, train:])
        accuracy = (up > down).float().mean(1).reshape(len(RATES), seeds)
        both = torch.stack([up, down])
        alike = 2 * ((up + down) / 2).var(1) / both.transpose(0, 1).flatten(1).var(1) - 1
    best = accuracy.argmax(0)
    return float(accuracy.amax(0).mean()), float(alike.reshape(len(RATES), seeds).gather(0, best[None]).mean())


def pairs_and_points(seeds: int = 10) -> list[Outcome]:
    shown, gaps, alike = [], {}, {}
    for strength in (0.0, 0.9):
        for width in WIDTHS if strength else (3,):
            pairwise, pointwise = (ranked(loss, width, strength, seeds) for loss in (DPO(1.0), BCOPair(1.0)))
            gaps[strength, width] = 100 * (pairwise[0] - pointwise[0])
            alike[strength, width] = pairwise[1], pointwise[1]
            shown.append(f"strength {strength:g}, width {width}: {pairwise[0]:.1%} / {pointwise[0]:.1%}")
    by_width = [gaps[0.9, width] for width in WIDTHS]
    settings = f"{TOY}mean of {seeds} seeds (1000 in the paper); better: by 3 points; equal: by less than 1"
    return [
        Outcome(
            "pairwise-at-width-3",
            f"held-out accuracy pairwise / pointwise: {'; '.join(shown)}",
            gaps[0.9, 3] >= 3,
            settings,
        ),
        Outcome(
            "equal-at-width-1",
            f"points at width 1: {gaps[0.9, 1]:.1f}",
            abs(gaps[0.9, 1]) < 1,
            settings,
        ),
        Outcome(
            "equal-above-width-4",
            f"points at width {', '.join(map(str, WIDTHS))}: {numbers(by_width, '.1f')}",
            all(abs(gaps[0.9, width]) < 1 for width in (6, 8)),
            settings,
            picture=Picture(
                "pairwise less pointwise held-out accuracy",
                "width",
                "points",
                {"strength 0.9": list(zip(map(float, WIDTHS), by_width, strict=True))},
            ),
        ),
        Outcome(
            "equal-without-bias",
            f"points at width 3: {gaps[0.0, 3]:.1f}",
            abs(gaps[0.0, 3]) < 1,
            settings,
        ),
        Outcome(
            "pointwise-icc",
            "ICC1 pairwise / pointwise: "
            + "; ".join(f"width {width}: {alike[0.9, width][0]:.2f} / {alike[0.9, width][1]:.2f}" for width in (3, 8)),
            all(alike[0.9, width][1] < alike[0.9, width][0] for width in (3, 8)),
            settings,
        ),
    ]
