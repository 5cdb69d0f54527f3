"""Short trainings of all pairs of a kernel and a divergence on cached states, and their ranks.

A stand-in for training a model: a low-rank change of its last hidden states is trained, everything below is frozen,
and next-token distributions use a reduced vocabulary. Losses, log-ratios, divergences and kernels are the shipped
ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.analysis.kernel_choice.measures import Triplets
from prefopt.analysis.kernel_choice.states import Side, States
from prefopt.losses import Loss, PreferenceBatch, Scores, parse
from prefopt.losses.divergences import NAMES, divergence, named
from prefopt.losses.kernel_functions import KERNELS
from prefopt.losses.numerics import masked_mean

PAIRS = tuple((kernel, name) for kernel in KERNELS for name in NAMES)
"""All 28, four kernels by seven divergences."""
BASELINE = ("dpo", "")
BETA = 0.1
STEPS = 30
SEEDS = 4
BATCH = 8
RANK = 16
LEARNING_RATE = 1e-4
HELD_OUT = 0.25

Embeddings = Literal["hidden", "given"]

_STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""By number of seeds, the 97.5% quantile of Student's t with one degree of freedom fewer."""
_STUDENT_OF_MORE = 2.31
_YARDSTICK = parse("kernel_dpo(gamma=0.0)")
"""The measures of held-out pairs: log-ratios and KL."""


@dataclass(frozen=True)
class Outcome:
    """Results on held-out pairs after training with a pair of kernel and divergence, one per seed.

    Attributes:
        kernel: or "dpo" for the plain objective.
        divergence: "" for the plain objective.
        losses: -log sigmoid(`BETA` * (difference of log-ratios)), for every pair of kernel and divergence.
        accuracies: share of held-out pairs whose log-ratios are in the right order.
        kls: KL(policy || reference) on those pairs, in nats per token.
    """

    kernel: str
    divergence: str
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    kls: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def kl(self) -> float:
        return sum(self.kls) / len(self.kls)


@dataclass(frozen=True)
class Trial:
    """All outcomes, lowest held-out loss first, and the plain objective's.

    Attributes:
        outcomes: of the 28 pairs.
        baseline: of `dpo` in the same trial.
        trained_on: pairs each was trained on.
        held_out: pairs each was evaluated on, drawn for each seed.
        left_out: share of the model's probability on tokens outside the reduced vocabulary.
    """

    outcomes: tuple[Outcome, ...]
    baseline: Outcome
    trained_on: int
    held_out: int
    left_out: float = 0.0

    def find(self, kernel: str, divergence: str) -> Outcome:
        return next(found for found in self.outcomes if (found.kernel, found.divergence) == (kernel, divergence))

    def rank(self, outcome: Outcome) -> int:
        """By held-out loss, from 1."""
        return self.outcomes.index(outcome) + 1

    def accuracy_rank(self, outcome: Outcome) -> int:
        """By held-out accuracy, from 1; ties share the best rank."""
        return 1 + sum(other.accuracy > outcome.accuracy + 1e-12 for other in self.outcomes)

    def gap(self, outcome: Outcome, other: Outcome) -> tuple[float, float]:
        """Mean of the first's held-out losses less the second's, seed by seed, and its standard error.

        Draws share rows, so they spread less than new data would; the error is corrected for it: the variance over
        seeds times 1 / seeds + held out / trained on (Nadeau and Bengio 2003, Machine Learning 52, eq. 8).
        """
        differences = torch.tensor(outcome.losses, dtype=torch.float64) - torch.tensor(other.losses)
        factor = 1 / len(differences) + self.held_out / self.trained_on
        return float(differences.mean()), float(differences.std()) * factor**0.5

    def tells(self, outcome: Outcome, other: Outcome) -> bool:
        """Whether `gap` is different from 0 at the 5% level, by Student's t; for two outcomes chosen beforehand."""
        mean, error = self.gap(outcome, other)
        return abs(mean) > _STUDENT.get(len(outcome.losses), _STUDENT_OF_MORE) * error


def expression(kernel: str, divergence: str, embeddings: Embeddings) -> str:
    """The loss as text."""
    if (kernel, divergence) == BASELINE:
        return f"dpo(beta={BETA})"
    given = f"kernel={kernel!r}, divergence={divergence!r}, beta={BETA}"
    return f"kernel_dpo({given}{', embeddings=' + repr(embeddings) if embeddings != 'hidden' else ''})"


def run_trial(
    states: States,
    triplets: Triplets | None = None,
    *,
    pairs: Iterable[tuple[str, str]] = PAIRS,
    seeds: int = SEEDS,
    steps: int = STEPS,
) -> Iterator[Outcome]:
    """Train each pair in turn; the plain objective comes first.

    Args:
        states: of the pairs to train on and to evaluate on.
        triplets: the embeddings that kernels compare, row for row those of `states`; None for the policy's own states.
        pairs: of kernel and divergence.
        seeds: trainings of each, every one with its own split, start and order, which are the same for all pairs.
        steps: of each training.
    """
    if triplets is not None and len(triplets) != len(states):
        raise ValueError(f"{len(triplets)} rows of embeddings for {len(states)} rows of states")
    for kernel, name in (BASELINE, *pairs):
        found = []
        for seed in range(seeds):
            loss = parse(expression(kernel, name, "hidden" if triplets is None else "given"))
            found.append(_train(states, triplets, loss, seed, steps))
        yield Outcome(kernel, name, *zip(*found, strict=True))


def ranked(outcomes: Iterable[Outcome], states: States) -> Trial:
    """The outcomes of `run_trial`, in order."""
    baseline, *others = outcomes
    held = held_out(len(states))
    return Trial(
        tuple(sorted(others, key=lambda found: found.loss)), baseline, len(states) - held, held, states.left_out
    )


def held_out(rows: int) -> int:
    return max(round(rows * HELD_OUT), 1)


class Change(nn.Module):
    """States plus a low-rank linear function of them, which is 0 at the start."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.down = nn.Parameter(torch.randn(width, RANK, generator=generator) / width**0.5)
        self.up = nn.Parameter(torch.zeros(RANK, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden @ self.down @ self.up


def _train(states: States, triplets: Triplets | None, loss: Loss, seed: int, steps: int) -> tuple[float, float, float]:
    """Held-out loss, accuracy and KL."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(states), generator=generator)
    held, seen = order[: held_out(len(states))], order[held_out(len(states)) :]
    policy = Change(states.prompt.shape[1], generator)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        rows = seen[torch.randperm(len(seen), generator=generator)[:BATCH]]
        optimizer.zero_grad()
        loss(batch_of(states, triplets, loss, policy, rows)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        batch = batch_of(states, None, _YARDSTICK, policy, held)
    sides = [side for side in (batch.chosen, batch.rejected) if side is not None]
    margins = (sides[0].ratios - sides[1].ratios).double()
    kl = sum(float(side.token_divergence("kl").sum()) for side in sides) / sum(
        int(side.lengths.sum()) for side in sides
    )
    return float(-F.logsigmoid(BETA * margins).mean()), float((margins > 0).double().mean()), kl


def batch_of(
    states: States, triplets: Triplets | None, loss: Loss, policy: nn.Module, rows: Tensor
) -> PreferenceBatch:
    """The batch that `loss` gets for these rows under a policy."""
    prompt = policy(states.prompt[rows])
    given: tuple[Tensor | None, ...] = (None, None, None)
    if triplets is not None:
        given = tuple(part[rows].float() for part in (triplets.prompt, triplets.chosen, triplets.rejected))
    return PreferenceBatch(
        chosen=_scores(states, states.chosen, loss, policy, rows, prompt, (given[0], given[1])),
        rejected=_scores(states, states.rejected, loss, policy, rows, prompt, (given[0], given[2])),
    )


def _scores(
    states: States,
    side: Side,
    loss: Loss,
    policy: nn.Module,
    rows: Tensor,
    prompt: Tensor,
    embeddings: tuple[Tensor | None, Tensor | None],
) -> Scores:
    longest = int(side.mask[rows].sum(1).max())
    mask, labels = side.mask[rows, :longest], side.labels[rows, :longest]
    hidden = policy(side.hidden[rows, :longest])
    log_probs, ref_log_probs = states.head.log_probs(hidden), side.ref_log_probs[rows, :longest]

    def taken(of: Tensor) -> Tensor:
        return of.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask

    token_logps, lengths = taken(log_probs), mask.sum(1)
    wanted = getattr(loss, "divergences", ())
    parts = [divergence(named(name), log_probs, ref_log_probs) * mask for name in wanted]
    return Scores(
        logps=token_logps.sum(1),
        lengths=lengths,
        ref_logps=taken(ref_log_probs).sum(1),
        token_logps=token_logps,
        token_mask=mask,
        token_divergences=torch.stack(parts, -1) if parts else None,
        divergences=tuple(wanted) or None,
        hidden=masked_mean(hidden.mT, mask.unsqueeze(1)),
        prompt_hidden=prompt,
        prompt_embedding=embeddings[0],
        embedding=embeddings[1],
    )
