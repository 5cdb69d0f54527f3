"""Micro-batches of single completions that make up a step: each is told how many rows of a role the others hold."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.losses.scores import Role
from prefopt.scoring.rows import SIZES


def with_mean_sizes(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step's micro-batches, each with the mean number of rows of either role; pairs as they are.

    transformers averages their losses with equal weight. A micro-batch of single completions holds some rows of a role
    by chance, or none: a mean over the rows that it has would count its rows more or less than those of the others.
    """
    if len(batches) < 2 or bool(batches[0].get("paired", True)):
        return batches
    numbers = [[(batch["roles"] == role).sum() for role in (Role.CHOSEN, Role.REJECTED)] for batch in batches]
    means = torch.stack([torch.stack(both) for both in numbers]).float().mean(0)
    return [{**batch, SIZES: means} for batch in batches]
