"""Micro-batches of single completions that make up a step: each is told how many rows of a role the others hold."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.losses import Loss
from prefopt.losses.scores import Role
from prefopt.scoring.rows import SIZES


class AccumulationMixin:
    """The part of `LossMixin` that looks at a step's micro-batches before the first of them is scored.

    transformers averages their losses with equal weight. A micro-batch of single completions holds some rows of a role
    by chance, or none: a mean over the rows that it has would count its rows more or less than those of the others.
    """

    objective: Loss | None

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        batches, count = super().get_batch_samples(*arguments, **keywords)  # type: ignore[misc]
        if self.objective is not None and len(batches) > 1 and not bool(batches[0].get("paired", True)):
            numbers = [[(batch["roles"] == role).sum() for role in (Role.CHOSEN, Role.REJECTED)] for batch in batches]
            means = torch.stack([torch.stack(both) for both in numbers]).float().mean(0)
            batches = [{**batch, SIZES: means} for batch in batches]
        return batches, count
