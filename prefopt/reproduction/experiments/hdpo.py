"""H-DPO (2411.07595): the optimum is a tempered DPO, and a small alpha keeps a narrow policy on one mode."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from prefopt.losses import HDPO
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import bradley_terry_optimum, entropy, numbers, total_variation

ALPHAS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 2.0)


def problem(seed: int, responses: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, reference = torch.randn((2, responses), generator=generator, dtype=torch.float64)
    return rewards, torch.log_softmax(reference, -1)


def closed_form(rewards: Tensor, reference: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.log_softmax((reference + rewards / beta) / alpha, -1)


def optimum(beta: float = 0.5) -> list[Outcome]:
    rewards, reference = problem(0)
    trained = [bradley_terry_optimum(HDPO(beta, alpha), rewards, reference) for alpha in ALPHAS]
    exact = [closed_form(rewards, reference, beta, alpha) for alpha in ALPHAS]
    distances = [total_variation(a, b) for a, b in zip(trained, exact, strict=True)]
    entropies = [float(entropy(logps)) for logps in trained]
    rising, at_equal_scale, sharper = 0, 0, 0
    for seed in range(1000):
        table = torch.stack([closed_form(*problem(seed), beta, alpha) for alpha in ALPHAS])
        rising += bool((entropy(table).diff() > 0).all())
        # alpha beta is what a step's gradient is scaled by; with it held, alpha only tempers the reference.
        equal = entropy(torch.stack([closed_form(*problem(seed), beta / alpha, alpha) for alpha in ALPHAS]))
        at_equal_scale += bool((equal.diff() > 0).all())
        sharper += bool(equal[1] < equal[3])
    return [
        Outcome(
            "optimum",
            f"largest total variation over alpha 0.5 to 2: {max(distances):.2g}",
            settings="6 responses, rewards and reference logits N(0, 1), beta 0.5",
            numbers={"total variation": [max(distances)]},
        ),
        Outcome(
            "entropy-rises",
            f"trained, alpha {numbers(list(ALPHAS))}: {numbers(entropies)}; closed form: {rising} of 1000 problems",
            entropies == sorted(entropies) and len(set(entropies)) == len(entropies) and rising == 1000,
            picture=Picture(
                "entropy of the trained table", "alpha", "nats", {"H-DPO": list(zip(ALPHAS, entropies, strict=True))}
            ),
        ),
        Outcome(
            "entropy-at-equal-scale",
            f"closed form, alpha beta 0.5: rises over alpha 0.5 to 2 in {at_equal_scale} of 1000 problems; lower at "
            f"alpha 0.8 than at 1 in {sharper}",
            at_equal_scale == 1000,
        ),
    ]


def log_density(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    values: Tensor = torch.distributions.Normal(mean, deviation).log_prob(x)  # type: ignore[no-untyped-call]
    return values


def gaussian_fits(half_distance: float, alphas: list[float]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the Gaussian that minimises -alpha H(pi) + H(pi, ref), on a grid.

    The reference is an equal mixture of Gaussians of deviation 1 at +- `half_distance`. The policy's entropy is exact,
    its cross-entropy with the reference is an integral over a fine grid.
    """
    x = torch.linspace(-12, 12, 601, dtype=torch.float64)
    one, shift = torch.ones((), dtype=torch.float64), torch.tensor(half_distance, dtype=torch.float64)
    log_ref = torch.logaddexp(log_density(x, -shift, one), log_density(x, shift, one))
    means = torch.linspace(0, 1.5 * half_distance, 76, dtype=torch.float64)
    deviations = torch.linspace(0.2, 1.2 * half_distance + 1.5, 200, dtype=torch.float64)
    fitted = log_density(x, means[:, None, None], deviations[None, :, None])
    cross = -(fitted.exp() * (log_ref - torch.log(torch.tensor(2.0)))).sum(-1) * (x[1] - x[0])
    best = []
    for alpha in alphas:
        objective = cross - alpha * torch.log(deviations)  # the entropy up to a constant
        best.append(divmod(int(objective.argmin()), len(deviations)))
    return [float(means[i]) for i, _ in best], [float(deviations[j]) for _, j in best]


def bimodal() -> list[Outcome]:
    alphas = [0.5 + 0.05 * k for k in range(16)]  # 0.5 to 1.25
    one = alphas.index(min(alphas, key=lambda a: abs(a - 1)))
    found, narrower, lines, widths = [], True, [], []
    for half_distance in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0):
        means, deviations = gaussian_fits(half_distance, alphas)
        narrower &= all(b >= a for a, b in pairwise(deviations))
        narrower &= deviations[0] < deviations[one]
        widths.append(f"+-{half_distance:g}: {numbers([deviations[0], deviations[6], deviations[one]], '.2f')}")
        straddles = [mean < 0.1 * half_distance for mean in means]
        locks = [mean > 0.5 * half_distance for mean in means]
        at_one = "straddles" if straddles[one] else "locks" if locks[one] else "in between"
        locked = [alpha for alpha, lock in zip(alphas, locks, strict=True) if lock]
        lines.append(f"+-{half_distance:g}: {at_one}, locked up to {f'{max(locked):.2f}' if locked else 'none'}")
        if straddles[one] and locked and max(locked) < 1:
            found.append(half_distance)
    chosen = "modes of deviation 1 at +-1 to +-3; straddling: mean within 0.1 of the middle, locked: past half way"
    return [
        Outcome(
            "locks-on-a-mode",
            f"at alpha = 1, and largest alpha that locks: {'; '.join(lines)}",
            bool(found),
            chosen,
        ),
        Outcome(
            "variance-falls",
            f"standard deviation at alpha 0.5, 0.8, 1: {'; '.join(widths)}",
            narrower,
            chosen,
        ),
    ]
