"""Micro-batches of single completions that make up a step: each carries their mean number of rows of each role."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.losses.scores import Role
from prefopt.scoring.rows import SIZES


def with_mean_sizes(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step's micro-batches, each with the mean number of rows of each role; batches of pairs are returned unchanged.

    transformers averages the losses of micro-batches with equal weight. A micro-batch of single completions holds a
    random number of rows of a role, possibly none. A mean over its own rows would weight them differently from the
    rows of other micro-batches.
    """
    if len(batches) < 2 or bool(batches[0].get("paired", True)):
        return batches
    numbers = [[(batch["roles"] == role).sum() for role in (Role.CHOSEN, Role.REJECTED)] for batch in batches]
    means = torch.stack([torch.stack(both) for both in numbers]).float().mean(0)
    return [{**batch, SIZES: means} for batch in batches]
