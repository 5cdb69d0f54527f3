"""Which pairs may lower the likelihood of their own chosen completions, known before training: the CHES score.

Two completions whose hidden states point the same way are pushed down together. One forward pass of the model over the
pairs is enough to see it. Imports scoring and data, never a trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.analysis.kernel_choice.states import forward
from prefopt.safety.errors import UsageError
from prefopt.scoring.head import head_of

_PAIRS_AT_ONCE = 64


@dataclass(frozen=True)
class Ches:
    """The CHES scores of N pairs; the higher, the more likely the chosen completion falls.

    Attributes:
        summed: (N,) <s_w, s_l> - |s_w|^2, s the sum of the last hidden states that a completion's tokens are predicted
            from. It grows with lengths.
        averaged: (N,) the same of means in place of sums, which the paper uses to filter data.
    """

    summed: Tensor
    averaged: Tensor

    def __len__(self) -> int:
        return self.averaged.shape[0]

    def worst(self, count: int) -> list[int]:
        """Numbers of the pairs with the highest averaged scores, the highest first."""
        return self.averaged.argsort(descending=True, stable=True)[:count].tolist()

    def lowest(self, share: float) -> list[int]:
        """Numbers of the pairs with the lowest averaged scores, in the order of the rows.

        Args:
            share: of the pairs to keep, above 0 and at most 1; at least one is kept. The paper keeps 0.05.
        """
        if not 0 < share <= 1:
            raise UsageError(f"the share of pairs to keep must be above 0 and at most 1, got {share}")
        count = max(1, round(share * len(self)))
        return sorted(self.averaged.argsort(stable=True)[:count].tolist())


@torch.no_grad()
def ches(model: Any, rows: Sequence[dict[str, Any]]) -> Ches:
    """CHES scores of tokenized pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    Razin et al. 2024, arXiv 2410.08847, definition 2 and its length-normalised variant; as
    princeton-nlp/unintentional-unalignment, ches/ches.py. A pair's score depends on the model that will be trained.

    Raises:
        UsageError: if there are no pairs, one has an empty side, or the model's head is not a plain linear layer.
    """
    head = head_of(model)
    if head is None:
        raise UsageError(f"hidden states are read before a plain linear head; that of {type(model).__name__} is not")
    if not rows:
        raise UsageError("there are no pairs to score")
    for number, row in enumerate(rows):
        if empty := [name for name in ("prompt", "chosen", "rejected") if not row[f"{name}_ids"]]:
            raise UsageError(f"row {number} has no {empty[0]} tokens")
    model.eval()
    parts = []
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some = rows[start : start + _PAIRS_AT_ONCE]
        jobs = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in some]
        _, hidden = forward(model, head, jobs)
        sums = torch.stack([states.double().sum(0) for states in hidden])
        lengths = torch.tensor([len(states) for states in hidden], dtype=torch.float64).unsqueeze(1)
        parts.append(torch.stack([_scores(sums), _scores(sums / lengths)]))
    summed, averaged = torch.cat(parts, 1)
    return Ches(summed, averaged)


def _scores(vectors: Tensor) -> Tensor:
    """(N,) of the (2 N, H) vectors of chosen, then rejected completions."""
    chosen, rejected = vectors.chunk(2)
    return (chosen * rejected).sum(-1) - (chosen * chosen).sum(-1)
