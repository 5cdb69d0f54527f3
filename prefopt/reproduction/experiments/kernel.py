"""DPO-Kernels (2501.03271): scales and limits, the margin that is a constant, mixtures that collapse, noisy labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.losses import HMK, KernelDPO, PreferenceBatch, Scores
from prefopt.losses.divergences import NAMES, Divergence, divergence
from prefopt.losses.kernel_functions import KERNELS, RBF, diagonal_precision, unit
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import descend, numbers


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(chosen: Tensor, rejected: Tensor, vectors: tuple[Tensor, Tensor, Tensor] | None = None) -> PreferenceBatch:
    """Pairs of one-token responses, of which the reference finds both equally likely.

    Args:
        chosen: (N,) log-probabilities of the policy.
        rejected: (N,) likewise.
        vectors: (N, H) of prompt, chosen and rejected.
    """
    prompt, up, down = (None, None, None) if vectors is None else vectors
    one, half = torch.ones(len(chosen), dtype=torch.long), torch.full_like(chosen, math.log(0.5))
    return PreferenceBatch(
        Scores(chosen, one, half, embedding=up, prompt_embedding=prompt),
        Scores(rejected, one, half, embedding=down, prompt_embedding=prompt),
    )


# ---- identities ----------------------------------------------------------------------------------------------------


def scale(steps: int = 200) -> Outcome:
    u, v = unit(normal(50, 6)), unit(normal(50, 6, seed=1))
    precision = diagonal_precision(torch.cat([u, v]), 0.5)
    off = max(float(kernel().log(u, u, precision).abs().max()) for kernel in KERNELS.values())
    mixture = HMK(alpha=0.0, entropy=0.0, embeddings="given").double()
    optimizer = torch.optim.SGD(mixture.parameters(), lr=20.0)
    even = torch.full((50,), math.log(0.5), dtype=torch.float64)
    batch, apart = pairs(even, even, (u, v, unit(normal(50, 6, seed=2)))), 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        mixture(batch).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights = torch.stack([weight.detach().exp() for weight in mixture.log_weights().values()])
        apart = max(apart, abs(float(weights.sum()) - 1))
    return Outcome(
        "normalised",
        f"largest |log K(u, u)| of {len(KERNELS)} kernels {off:.0e}; largest |sum of weights - 1| in {steps} steps "
        f"{apart:.0e}, from 1/4 each to {numbers(weights, '.2f')}",
        off < 1e-12 and apart < 1e-12,
    )


def limits(points: int = 2000) -> list[Outcome]:
    log_p, log_r = (torch.log_softmax(normal(points, 50, seed=seed), -1) for seed in (0, 1))
    kinds = [Divergence(n, 0.9 if n == "renyi" else None, "triangular" if n == "f" else None) for n in NAMES]
    value = {kind.name: divergence(kind, log_p, log_r) for kind in kinds}
    same = max(float(divergence(kind, log_p, log_p).abs().max()) for kind in kinds)
    least = min(float(some.min()) for some in value.values())
    far = torch.log_softmax(30 * normal(points, 50, seed=2), -1)
    most = float(divergence(Divergence("js"), log_p, far).max())
    off = float((value["bhattacharyya"] + torch.log1p(-value["hellinger"])).abs().max())
    near = float((divergence(Divergence("renyi", 0.9999), log_p, log_r) - value["kl"]).abs().max())
    return [
        Outcome(
            "divergences-zero",
            f"{points} random pairs over 50 tokens: at most {same:.0e} with itself, at least {least:.3g} with another",
            same < 1e-12 and least > 0,
        ),
        Outcome(
            "divergence-limits",
            f"largest JS {most:.4f} (log 2 = {math.log(2):.4f}); Bhattacharyya off by {off:.0e}; Renyi of order "
            f"0.9999 within {near:.0e} of KL",
            most <= math.log(2) + 1e-12 and off < 1e-12 and near < 1e-3,
        ),
    ]


# ---- what a frozen encoder's margin does ---------------------------------------------------------------------------


def constant(steps: int = 200) -> list[Outcome]:
    """Twenty pairs whose policies are trained with the kernel's margin and without it."""
    vectors = tuple(unit(normal(20, 6, seed=seed)) for seed in (3, 4, 5))

    def trained(link: str, gamma: float) -> Tensor:
        loss = KernelDPO(alpha=0.0, gamma=gamma, link=link, beta=1.0, embeddings="given")  # type: ignore[arg-type]

        def objective(logits: Tensor) -> Tensor:
            logps = torch.log_softmax(logits, -1)
            value: Tensor = loss(pairs(logps[:, 0], logps[:, 1], vectors)).loss  # type: ignore[arg-type]
            return value

        return torch.log_softmax(descend(objective, torch.zeros(20, 2, dtype=torch.float64), 1.0, steps)[-1], -1)

    gaps = {link: float((trained(link, 1.0) - trained(link, 0.0)).abs().max()) for link in ("linear", "logistic")}
    settings = f"rbf kernel, gamma 0 or 1, no divergence, {steps} steps of gradient descent"
    return [
        Outcome(
            "margin-is-constant",
            f"largest difference of a log-probability: {gaps['linear']:.0e}",
            gaps["linear"] == 0,
            settings,
        ),
        Outcome(
            "logistic-margin-moves",
            f"largest difference of a log-probability: {gaps['logistic']:.2g}",
            gaps["logistic"] > 0.01,
            settings,
        ),
    ]


def collapse(steps: int = 1000) -> Outcome:
    """A mixture alone, on chosen vectors near the prompt's and rejected ones opposite to it."""
    x = unit(normal(64, 8))
    near, far = unit(x + 0.1 * normal(64, 8, seed=1)), unit(-x + 0.1 * normal(64, 8, seed=2))
    even = torch.full((64,), math.log(0.5), dtype=torch.float64)
    found = {}
    for entropy in (HMK().entropy, 0.0):
        mixture = HMK(alpha=0.0, entropy=entropy, embeddings="given").double()
        optimizer = torch.optim.Adam(mixture.parameters(), lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            mixture(pairs(even, even, (x, near, far))).loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found[entropy] = {name: float(weight.detach().exp()) for name, weight in mixture.log_weights().items()}
    kept, lost = (min(weights.values()) for weights in found.values())
    largest = max(found[0.0], key=lambda name: found[0.0][name])
    return Outcome(
        "collapse",
        f"smallest weight after {steps} steps: {kept:.3f} with the term, {lost:.0e} without it, where {largest} has "
        f"{found[0.0][largest]:.3f}",
        kept > 0.05 > lost,
        "entropy weight 0.1 (our default), Adam at 0.02, 64 pairs of 8 dimensions",
    )


# ---- noisy labels --------------------------------------------------------------------------------------------------

WIDTH, STYLE, PAIRS, HELD_OUT, FLIPPED, SEEDS = 8, 16, 64, 2000, 0.2, 20
CHOSEN_HERE = (
    f"{PAIRS} pairs, {FLIPPED:.0%} of them flipped, {SEEDS} seeds, {HELD_OUT} held-out pairs with true labels. What "
    f"is preferred: 4 cos(prompt, response) in {WIDTH} dimensions, which only the encoder sees, plus as much of "
    f"{STYLE} traits, which only the policy sees (log-linear in them). rbf kernel, beta 1, no divergence, 500 steps "
    "at 0.5"
)


class World:
    """Pairs whose better response is told half by what an encoder sees, half by what the policy sees."""

    def __init__(self, seed: int):
        self.draw = torch.Generator().manual_seed(seed)
        self.taste = math.sqrt(2) * unit(self.normal(1, STYLE))[0]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def unrelated(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors that have nothing to do with the responses."""
        prompt, chosen, rejected = (unit(self.normal(count, WIDTH)) for _ in range(3))
        return prompt, chosen, rejected

    def sample(self, count: int, flipped: float = 0.0) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Vectors of prompt, chosen and rejected; (N, STYLE) traits of chosen less rejected; which are flipped."""
        prompt, one, two = (unit(self.normal(count, WIDTH)) for _ in range(3))
        traits = self.normal(count, STYLE) - self.normal(count, STYLE)
        worth = 4 * (prompt * (one - two)).sum(-1) + traits @ self.taste
        flip = torch.rand(count, generator=self.draw) < flipped
        sign = worth.sign() * torch.where(flip, -1.0, 1.0)
        first = (sign > 0).unsqueeze(-1)
        vectors = prompt, torch.where(first, one, two), torch.where(first, two, one)
        return vectors, traits * sign.unsqueeze(-1), flip


def kernel_margin(vectors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    prompt, chosen, rejected = vectors
    return RBF().log(prompt, chosen) - RBF().log(prompt, rejected)


def learned(seed: int, gamma: float, blind: bool = False) -> tuple[float, float]:
    """Held-out accuracy of the margin that the loss sees, and of the policy's log-ratios alone.

    Args:
        seed: of the world and its pairs.
        gamma: weight of the kernel's margin.
        blind: give the loss vectors that have nothing to do with the responses.
    """
    world = World(seed)
    (vectors, traits, _), (others, held_out, _) = world.sample(PAIRS, FLIPPED), world.sample(HELD_OUT)
    if blind:
        vectors, others = world.unrelated(PAIRS), world.unrelated(HELD_OUT)
    loss = KernelDPO(alpha=0.0, gamma=gamma, beta=1.0, embeddings="given")

    def objective(theta: Tensor) -> Tensor:
        # The two responses' log-probabilities, of a policy over these two.
        d = traits @ theta
        logsigmoid = torch.nn.functional.logsigmoid
        value: Tensor = loss(pairs(logsigmoid(d), logsigmoid(-d), vectors)).loss
        return value

    theta = descend(objective, torch.zeros(STYLE, dtype=torch.float64), 0.5, 500)[-1]
    d = held_out @ theta
    hybrid = d + gamma * kernel_margin(others)
    return float((hybrid > 0).double().mean()), float((d > 0).double().mean())


def gap(mine: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean difference over seeds and its standard error."""
    apart = mine - other
    return float(apart.mean()), float(apart.std() / math.sqrt(len(apart)))


def noise() -> list[Outcome]:
    found = {gamma: torch.tensor([learned(seed, gamma) for seed in range(SEEDS)]) for gamma in (0.0, 1.0, 4.0)}
    blind = torch.tensor([learned(seed, 1.0, blind=True) for seed in range(SEEDS)])
    plain = found[0.0][:, 0]
    together, alone = (gap(found[1.0][:, column], plain) for column in (0, 1))
    none = gap(blind[:, 0], plain)

    def means(column: int) -> str:
        return ", ".join(f"gamma {gamma:g} {float(rows[:, column].mean()):.1%}" for gamma, rows in found.items())

    weights = [
        torch.sigmoid(-kernel_margin(vectors))[flip == one].mean()
        for one in (True, False)
        for vectors, _, flip in [World(0).sample(100_000, FLIPPED)]
    ]
    return [
        Outcome(
            "hybrid-ranks",
            f"accuracy of the margin: {means(0)}; gamma 1 less gamma 0 "
            f"{together[0]:+.2%}, standard error {together[1]:.2%}",
            together[0] > 2 * together[1],
            CHOSEN_HERE,
            numbers={"gain": (found[1.0][:, 0] - plain).tolist()},
            picture=Picture(
                "held-out accuracy under 20% flipped labels",
                "gamma",
                "accuracy",
                {
                    name: [(gamma, float(rows[:, column].mean())) for gamma, rows in found.items()]
                    for column, name in enumerate(("margin with the kernel", "log-ratios alone"))
                },
            ),
        ),
        Outcome(
            "policy-ranks",
            f"accuracy of the log-ratio: {means(1)}; gamma 1 less gamma 0 "
            f"{alone[0]:+.2%}, standard error {alone[1]:.2%}",
            alone[0] > 2 * alone[1],
            CHOSEN_HERE,
            numbers={"gain": (found[1.0][:, 1] - plain).tolist()},
        ),
        Outcome(
            "flipped-weight",
            f"mean weight of the log-ratio's gradient at the start: flipped {float(weights[0]):.3f}, "
            f"right {float(weights[1]):.3f}; without a kernel 0.5 each",
            bool(weights[0] < weights[1]),
            CHOSEN_HERE,
        ),
        Outcome(
            "useless-embeddings",
            f"accuracy: DPO {float(plain.mean()):.1%}, hybrid {float(blind[:, 0].mean()):.1%}; difference "
            f"{none[0]:+.2%}, standard error {none[1]:.2%}",
            none[0] > -2 * none[1],
            CHOSEN_HERE,
            numbers={"gain": (blind[:, 0] - plain).tolist()},
        ),
    ]
