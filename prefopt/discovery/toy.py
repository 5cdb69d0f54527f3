"""A preference problem with a known reward, small enough to train in a tenth of a second for all betas and seeds.

A contextual bandit: prompts with K answers each, a reference policy over them, a gold reward, and offline pairs that
a noisy annotator with a taste for length has labelled. The policy is the reference, tilted by features of an answer:
log pi(y|x) = log ref(y|x) + theta . phi(x, y) - log Z(x), so that a pair's margin is theta . (phi_w - phi_l).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefopt.discovery.grammar import Node, evaluate
from prefopt.losses.numerics import numbered_generator

Family = Literal["linear", "bent"]
"""How the gold reward follows from an answer's features: a linear function, or one of a random layer of tanh."""

PROMPTS, ANSWERS, FEATURES, PAIRS = 64, 8, 24, 512
CLEAR = 2.0
"""The annotator's factor on a difference of gold reward, in standard deviations."""
LENGTH_TASTE = 0.5
"""The annotator's factor on a difference of length, in standard deviations. The gold reward ignores length."""

_BATCH, _RATE = 64, 0.05


@dataclass(frozen=True)
class Worlds:
    """S problems of one size, stacked. C prompts, K answers, F features, N pairs.

    Attributes:
        seeds: of the problems.
        features: (S, C, K, F).
        ref_logps: (S, C, K) of the reference, normalised over K.
        gold: (S, C, K) reward, with mean 0 and standard deviation 1 under the reference.
        lengths: (S, C, K) of the answers, in tokens.
        differences: (S, N, F) features of the chosen answer minus those of the rejected one.
    """

    seeds: tuple[int, ...]
    features: Tensor
    ref_logps: Tensor
    gold: Tensor
    lengths: Tensor
    differences: Tensor


@dataclass(frozen=True)
class Outcome:
    """What training gave, for B betas and S seeds.

    Attributes:
        reward: (B, S) gold reward of the policy, in standard deviations above the reference.
        kl: (B, S) KL(policy || reference) in nats, mean over prompts.
        length: (B, S) tokens of an answer, minus the reference's.
        value: (B, S) what a loss with this beta is for, CLEAR E[gold] - beta KL, as a share of its maximum over all
            policies: 0 for the reference, 1 for the best policy, which is ref exp(CLEAR gold / beta) / Z.
    """

    reward: Tensor
    kl: Tensor
    length: Tensor
    value: Tensor


def make_worlds(seeds: Sequence[int], family: Family = "linear") -> Worlds:
    """Problems with these seeds, each of which depends on its seed and family alone."""
    problems = [_one_world(seed, family) for seed in seeds]
    stacked = [torch.stack(tensors) for tensors in zip(*problems, strict=True)]
    return Worlds(tuple(seeds), *stacked)


def _one_world(seed: int, family: Family) -> tuple[Tensor, ...]:
    random = numbered_generator(seed, ("linear", "bent").index(family))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    features = normal(PROMPTS, ANSWERS, FEATURES)
    # One feature is the length, so that a policy can learn the annotator's taste for it.
    lengths = (40 * torch.exp(0.4 * features[..., 0])).round().clamp(min=1)
    ref_logps = torch.log_softmax(normal(PROMPTS, ANSWERS), -1)
    told = features[..., 1:]
    if family == "linear":
        gold = told @ normal(FEATURES - 1) + normal(PROMPTS, ANSWERS)
    else:
        hidden = torch.tanh(told @ normal(FEATURES - 1, FEATURES) / FEATURES**0.5 * 2)
        gold = hidden @ normal(FEATURES) + 0.5 * normal(PROMPTS, ANSWERS)
    gold, size = _standard(gold, ref_logps), _standard(lengths, ref_logps)
    prompts = torch.randint(PROMPTS, (PAIRS,), generator=random)
    first, second = _two_answers(ref_logps[prompts], random)
    taste = CLEAR * gold + LENGTH_TASTE * size
    first_wins = torch.sigmoid(taste[prompts, first] - taste[prompts, second])
    swap = torch.rand(PAIRS, generator=random, dtype=torch.float64) > first_wins
    chosen, rejected = torch.where(swap, second, first), torch.where(swap, first, second)
    differences = features[prompts, chosen] - features[prompts, rejected]
    return features, ref_logps, gold, lengths, differences


def _standard(values: Tensor, ref_logps: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 under the reference, prompts alike."""
    weights = ref_logps.exp() / len(ref_logps)
    centred = values - (weights * values).sum()
    scaled: Tensor = centred / (weights * centred**2).sum().sqrt()
    return scaled


def _two_answers(ref_logps: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N,) numbers of two different answers to each prompt, drawn from the reference."""
    drawn = torch.multinomial(ref_logps.exp(), 2, replacement=False, generator=random)
    return drawn[:, 0], drawn[:, 1]


def train(node: Node, worlds: Worlds, betas: Sequence[float], steps: int) -> Outcome:
    """Train a policy with a loss from the reference on, for all betas and problems at once.

    Adam with a rate that falls to 0, in batches of 64 pairs that depend on the step alone. What is not finite stays
    in its own beta and seed.
    """
    seeds, pairs, features = worlds.differences.shape
    beta = worlds.differences.new_tensor(betas).reshape(-1, 1, 1)
    theta = worlds.differences.new_zeros(len(betas), seeds, features)
    random = numbered_generator(0)
    optimizer = torch.optim.Adam([theta], lr=_RATE)
    for step in range(steps):
        if step * _BATCH % pairs == 0:
            order = torch.randperm(pairs, generator=random)
        rows = order[step * _BATCH % pairs :][:_BATCH]
        batch = worlds.differences[:, rows]
        x = (beta * torch.einsum("bsf,snf->bsn", theta, batch)).requires_grad_()
        values = evaluate(node, x, beta).expand_as(x)
        (slope,) = torch.autograd.grad(values.sum(), x)
        theta.grad = torch.einsum("bsn,snf->bsf", beta * slope, batch) / len(rows)
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
        optimizer.step()
    return measure(theta, worlds, betas)


def measure(theta: Tensor, worlds: Worlds, betas: Sequence[float]) -> Outcome:
    """Reward, KL, length and value of the (B, S, F) policies, exactly, over all answers."""
    logps = torch.log_softmax(worlds.ref_logps + torch.einsum("bsf,sckf->bsck", theta, worlds.features), -1)
    policy, reference = logps.exp(), worlds.ref_logps.exp()

    def mean(values: Tensor) -> Tensor:
        return values.sum(-1).mean(-1)

    reward, kl = mean(policy * worlds.gold), mean(policy * (logps - worlds.ref_logps))
    beta = theta.new_tensor(betas)[:, None]
    return Outcome(
        reward,
        kl,
        mean((policy - reference) * worlds.lengths),
        (CLEAR * reward - beta * kl) / best_value(worlds, betas),
    )


def best_value(worlds: Worlds, betas: Sequence[float]) -> Tensor:
    """(B, S) maximum of CLEAR E[gold] - beta KL: the mean over prompts of beta log E_ref exp(CLEAR gold / beta)."""
    beta = worlds.gold.new_tensor(betas).reshape(-1, 1, 1, 1)
    return (beta.squeeze(-1) * torch.logsumexp(worlds.ref_logps + CLEAR * worlds.gold / beta, -1)).mean(-1)
