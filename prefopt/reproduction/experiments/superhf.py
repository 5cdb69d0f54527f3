"""SuperHF (2310.16763): supervised training on the best of B samples, with and without its KL prior, on a bandit."""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses import PreferenceBatch, Scores, presets
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import entropy, numbers

RESPONSES = 50


def best_of(count: int, draws: int = 200_000) -> float:
    generator = torch.Generator().manual_seed(count)
    rewards = torch.randn(draws, count, generator=generator, dtype=torch.float64)
    return float(rewards.max(1).values.mean())


def filtering() -> Outcome:
    sizes = (1, 2, 4, 8, 16, 32)
    means = [best_of(size) for size in sizes]
    return Outcome(
        "best-of-n",
        f"B {', '.join(map(str, sizes))}: {numbers(means, '.3f')}",
        means == sorted(means) and abs(means[4] - 1.766) < 0.01,
    )


def bandit(kl: float, seed: int, steps: int) -> tuple[float, float, float, float]:
    """(entropy, mean reward) at the start and at the end: A = 2 prompts a step, best of B = 16."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2, RESPONSES, generator=generator)
    reference = torch.log_softmax(torch.randn(2, RESPONSES, generator=generator), -1)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.01)
    loss = presets()["superhf"].build(kl=kl)
    rows, ones = torch.arange(2), torch.ones(2, dtype=torch.long)
    for _ in range(steps):
        logps = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(logps.detach().exp(), 16, replacement=True, generator=generator)
        kept = drawn.gather(1, rewards.gather(1, drawn).argmax(1, keepdim=True)).squeeze(1)
        forward_kl = (reference.exp() * (reference - logps)).sum(-1, keepdim=True)
        scores = Scores(
            logps=logps[rows, kept],
            lengths=ones,
            token_logps=logps[rows, kept].unsqueeze(1),
            token_mask=ones.bool().unsqueeze(1),
            token_forward_kl=forward_kl,
        )
        optimizer.zero_grad()
        loss(PreferenceBatch(chosen=scores)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def state(logps: Tensor) -> tuple[float, float]:
        return float(entropy(logps).mean()), float((logps.exp() * rewards).sum(-1).mean())

    return (*state(reference), *state(torch.log_softmax(logits.detach(), -1)))


def prior(steps: int = 2000, seeds: int = 5) -> list[Outcome]:
    runs = {kl: torch.tensor([bandit(kl, seed, steps) for seed in range(seeds)]) for kl in (0.0, 0.1, 0.35, 1.0)}
    ends = {kl: values.mean(0) for kl, values in runs.items()}
    shown = "; ".join(f"lambda {kl:g}: {numbers(values[2:], '.3f')}" for kl, values in ends.items())
    start = ends[0.0][:2]
    wider = runs[0.35][:, 2] > runs[0.0][:, 2]
    poorer = runs[0.35][:, 3] <= runs[0.0][:, 3]
    settings = (
        f"2 prompts of {RESPONSES} responses, rewards and logits N(0, 1), A = 2, B = 16, K = 1 (the paper's), "
        f"Adam, lr 0.01, {steps} steps, {seeds} seeds"
    )
    measured = f"mean entropy, reward: start {numbers(start, '.3f')}; {shown}"
    return [
        Outcome(
            "prior-keeps-entropy",
            f"{measured}; in {int((wider & poorer).sum())} of {seeds} seeds",
            settings=settings,
            numbers={
                "entropy at 0.35": runs[0.35][:, 2].tolist(),
                "entropy at 0": runs[0.0][:, 2].tolist(),
                "reward at 0.35": runs[0.35][:, 3].tolist(),
                "reward at 0": runs[0.0][:, 3].tolist(),
            },
            picture=Picture(
                "reward against entropy, lambda 0, 0.1, 0.35, 1 from the left",
                "entropy, nats",
                "mean reward",
                {"SuperHF": [(float(values[2]), float(values[3])) for values in ends.values()]},
            ),
        ),
        Outcome(
            "reward-rises",
            measured,
            settings=f"{settings}; well above: by 0.5 standard deviations of the reward or more",
            numbers={"gain": (runs[0.35][:, 3] - runs[0.35][:, 1]).tolist()},
        ),
    ]
