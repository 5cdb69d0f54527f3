"""A loss that certain rows spoil: those whose column `poison` says so."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from prefopt.losses import Loss, PreferenceBatch, parse
from tests.trainer.runs import make_pairs

LOSS, GRADIENT = 1.0, 2.0
"""What of a row is not finite: its loss, or only the gradient of it."""


class Poisoned(Loss):
    """-log pi(chosen) per token, a tenth of it; not a number, or 0 with a gradient that is none, where asked for."""

    roles = ("chosen",)
    columns = ("poison",)
    batchwise = False

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen = batch.chosen
        assert chosen is not None
        values = -0.1 * chosen.logps / chosen.lengths
        poison = chosen.columns["poison"]
        # Only rows that ask for it may come near either: 0 * nan is nan, and the square root's gradient infinite at 0.
        for kind, spoil in ((LOSS, lambda some: some * float("nan")), (GRADIENT, lambda some: torch.sqrt(0 * some))):
            values = values.masked_scatter(poison == kind, spoil(values[poison == kind]))
        return values


def loss_of(expression: str) -> Loss:
    return parse(expression) + Poisoned()


def pairs(kind: float, row: int | None, rows: int = 32) -> Dataset:
    """Pairs of which one, if any, is poisoned; it can be told by its words."""
    made = make_pairs(rows, poison=[kind if i == row else 0.0 for i in range(rows)])
    return made.map(_marked, with_indices=True, fn_kwargs={"row": row})


def _marked(example: dict[str, Any], index: int, row: int | None) -> dict[str, Any]:
    if index == row:
        example["chosen"][0]["content"] = "a poisoned bridge"
    return example
