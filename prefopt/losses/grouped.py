"""What a loss over groups is: several scored completions of each prompt, one value a group. Imports torch alone.

Groups may differ in size. A loss works on them side by side, as (G, K) tensors in which short groups are filled up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefopt.losses.base import Loss
from prefopt.losses.checks import positive
from prefopt.losses.needs import Need
from prefopt.losses.scores import PreferenceBatch, Scores


@dataclass(frozen=True)
class Groups:
    """G groups of at most K completions, side by side.

    Attributes:
        rewards: (G, K) the objective's rewards of the completions, 0 where a group has fewer.
        scores: (G, K) from the data, the highest is the best.
        present: (G, K) bool, true where there is a completion.
    """

    rewards: Tensor
    scores: Tensor
    present: Tensor

    @classmethod
    def of(cls, candidates: Scores, rewards: Tensor) -> Groups:
        """The groups of N completions with (N,) rewards."""
        assert candidates.group_sizes is not None
        assert candidates.score is not None
        sizes = candidates.group_sizes
        counts = torch.tensor(sizes, dtype=torch.long, device=rewards.device)
        present = torch.arange(max(sizes, default=1), device=rewards.device) < counts[:, None]
        return cls(_side_by_side(rewards, sizes), _side_by_side(candidates.score.to(rewards), sizes), present)

    @property
    def sizes(self) -> Tensor:
        """(G,) the number of completions."""
        return self.present.sum(-1)

    @property
    def better(self) -> Tensor:
        """(G, K, K) bool, whether the first completion has a higher score than the second; equal ones have none."""
        both = self.present[:, :, None] & self.present[:, None, :]
        return both & (self.scores[:, :, None] > self.scores[:, None, :])

    @property
    def best_first(self) -> Tensor:
        """(G, K) positions in each group, the highest score first; of equal scores the one that comes first."""
        return self.scores.masked_fill(~self.present, -torch.inf).argsort(dim=-1, descending=True, stable=True)

    def mean(self, values: Tensor) -> Tensor:
        """(G, 1) mean of (G, K) values over each group."""
        return (values * self.present).sum(-1, keepdim=True) / self.sizes[:, None]

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """(G, 1) log of the sum of exp of (G, K) values over each group."""
        return torch.logsumexp(values.masked_fill(~self.present, -torch.inf), -1, keepdim=True)

    def softmax(self, values: Tensor) -> Tensor:
        """(G, K) shares of each group that add up to 1."""
        return torch.softmax(values.masked_fill(~self.present, -torch.inf), -1)


def _side_by_side(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return pad_sequence(list(torch.split(values, list(sizes))), batch_first=True) if sizes else values.new_zeros(0, 1)


class GroupLoss(Loss):
    """A loss over groups, whose reward of a completion is beta times its log-ratio.

    Subclasses write `per_group`.
    """

    roles = ("candidate",)
    grouped = True
    reads_scores = True
    needs = Need.REFERENCE
    beta: float

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = positive("beta", beta)

    @abstractmethod
    def per_group(self, groups: Groups) -> Tensor:
        """(G,) loss values."""

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.candidate is not None
        return self.per_group(Groups.of(batch.candidate, self.reward(batch.candidate)))

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return metrics_of(self, batch)


def metrics_of(loss: Loss, batch: PreferenceBatch) -> dict[str, Tensor]:
    """What a loss over groups logs of its rewards; nothing if it has none."""
    assert batch.candidate is not None
    with torch.no_grad():
        rewards = loss.reward(batch.candidate)
        return {} if rewards is None else group_metrics(Groups.of(batch.candidate, rewards.detach()))


def group_metrics(groups: Groups) -> dict[str, Tensor]:
    """Rewards of the best and the worst completion by score, (G,) each, and which pairs the rewards order like scores.

    Of several best or worst ones it is the mean. Groups whose scores are all equal have no accuracy.
    """
    inf = torch.inf
    best = groups.scores.masked_fill(~groups.present, -inf).amax(-1, keepdim=True)
    worst = groups.scores.masked_fill(~groups.present, inf).amin(-1, keepdim=True)
    ends = {}
    for name, extreme in (("best", best), ("worst", worst)):
        chosen = groups.present & (groups.scores == extreme)
        ends[name] = (groups.rewards * chosen).sum(-1) / chosen.sum(-1)
    higher = groups.rewards[:, :, None] > groups.rewards[:, None, :]
    pairs = groups.better.sum((-1, -2))
    right = (groups.better & higher).sum((-1, -2)).to(groups.rewards)
    return {
        "rewards/best": ends["best"],
        "rewards/worst": ends["worst"],
        "rewards/margins": ends["best"] - ends["worst"],
        "rewards/accuracies": (right / pairs.clamp(min=1))[pairs > 0],
    }
