"""The implicit reward of a model, pair by pair. Imports losses and scoring, never a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.analysis.gradients.push import pushes, refuse_unpushable
from prefopt.losses import Loss, PreferenceBatch, parse
from prefopt.safety.errors import UsageError
from prefopt.scoring import PreferenceCollator, Scorer

AT_ONCE = 8
"""Pairs in a forward pass."""
BINS = 10
"""Of confidences from 0.5 to 1, each as wide."""


@dataclass(frozen=True)
class PairTable:
    """N pairs under a model; (N,) float64 tensors on the CPU.

    Attributes:
        loss: the expression.
        margins: reward of the chosen answer less that of the rejected one. The Bradley-Terry probability that the
            model gives to the label is its sigmoid.
        chosen_lengths: tokens.
        rejected_lengths: tokens.
        push: size of the loss's derivatives for the two log-probabilities, |d_w| + |d_l|.
        push_at_start: the same where policy = reference; of a loss without reference, the largest of any pair.
    """

    loss: str
    margins: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    push: Tensor
    push_at_start: Tensor

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def accuracy(self) -> float:
        """The share of pairs that are ranked as labelled."""
        return float((self.margins > 0).double().mean())

    @property
    def confidence(self) -> Tensor:
        """(N,) the model's probability for the answer that it ranks first, 0.5 to 1."""
        return self.margins.abs().sigmoid()

    @property
    def brier(self) -> float:
        """Brier score: mean of (1 - sigmoid(margin))^2; 0.25 for a model that knows nothing, 0 for a perfect one."""
        return float((1 - self.margins.sigmoid()).square().mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance between confidence and accuracy over `BINS` bins of confidence.

        Reference: Guo et al. 2017, arXiv 1706.04599, equation 3.
        """
        place = ((self.confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
        gap = self.confidence - (self.margins > 0).double()
        sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, gap)
        return float(sums.abs().sum() / len(self))

    @property
    def explained_by_length(self) -> float:
        """The share of the margins' variance that a line in the difference of lengths explains (R^2)."""
        difference = self.chosen_lengths - self.rejected_lengths
        both = torch.stack([difference, self.margins])
        if len(self) < 3 or bool((both.std(dim=1) == 0).any()):
            return 0.0
        return float(torch.corrcoef(both)[0, 1] ** 2)


def score_pairs(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    loss: Loss | str,
    pad_token_id: int | None,
    *,
    reference: nn.Module | None = None,
    max_length: int | None = None,
) -> PairTable:
    """Score tokenized pairs under a model; a forward pass of each, and one of the reference where the loss has one.

    Args:
        model: a causal language model, in evaluation mode afterwards.
        rows: with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        loss: a loss or an expression with an implicit reward.
        pad_token_id: the tokenizer's.
        reference: as `Scorer` has it.
        max_length: longer rows are cut.

    Raises:
        UsageError: for a loss without reward, or one that reads more than log-probabilities.
    """
    objective = parse(loss) if isinstance(loss, str) else loss
    refuse_unpushable(objective)
    if not objective.has_reward:
        raise UsageError(f"{objective} gives single answers no reward, so there is nothing to rank pairs by")
    collate = PreferenceCollator.for_loss(objective, pad_token_id, max_length=max_length)
    scorer = Scorer(objective, model.eval(), reference)
    parts = []
    for start in range(0, len(rows), AT_ONCE):
        with torch.no_grad():
            batch = scorer(collate(rows[start : start + AT_ONCE]), every_role=True)
        parts.append(_numbers(objective, batch))
    margins, chosen, rejected, push, at_start = (torch.cat(part) for part in zip(*parts, strict=True))
    at_start = torch.where(at_start.isnan(), push.max(), at_start)
    return PairTable(str(objective), margins, chosen, rejected, push, at_start)


def _numbers(loss: Loss, batch: PreferenceBatch) -> tuple[Tensor, ...]:
    """Margins, lengths, pushes, and pushes at the start (NaN where no reference is known) of a batch."""
    chosen, rejected = batch.chosen, batch.rejected
    assert chosen is not None
    assert rejected is not None
    rewards = loss.reward(chosen), loss.reward(rejected)
    assert rewards[0] is not None
    assert rewards[1] is not None
    push = _size(pushes(loss, batch))
    at_start = torch.full_like(push, torch.nan)
    w_ref, l_ref = chosen.ref_logps, rejected.ref_logps
    if w_ref is not None and l_ref is not None and chosen.token_logps is None:
        still = replace(batch, chosen=replace(chosen, logps=w_ref), rejected=replace(rejected, logps=l_ref))
        at_start = _size(pushes(loss, still))
    values = (rewards[0] - rewards[1], chosen.lengths, rejected.lengths, push, at_start)
    return tuple(value.double().cpu() for value in values)


def _size(both: tuple[Tensor, Tensor]) -> Tensor:
    return both[0].abs() + both[1].abs()
