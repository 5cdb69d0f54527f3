"""The values that a loss's `per_example` returns, checked without asking the device.

A wrong shape would be averaged without an error, and values without a gradient would train nothing.

Imports torch and its neighbours `needs` and `scores`.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefopt.losses.errors import LossError
from prefopt.losses.needs import QUANTITIES
from prefopt.losses.scores import PreferenceBatch, Scores

_WITH_GRADIENT = ("logps", *(name for quantity in QUANTITIES.values() for name in quantity.gradient))


def values_of(loss: Any, batch: PreferenceBatch, absent: Mapping[str, str]) -> Tensor:
    """(N,) the loss's values of a batch.

    Args:
        loss: a `Loss`.
        batch: what it is called with.
        absent: fields of `Scores` that are None in the batch, and the need that supplies each.

    Raises:
        LossError: if the values are not a tensor of one number per example, have no gradient although the scores
            have one, or if the loss reads an absent field. It names the loss, the shape and what was returned.
    """
    try:
        values = loss.per_example(batch)
    except (TypeError, AttributeError, KeyError) as error:
        if (reason := _reads_absent(error, absent)) is None:
            raise
        raise LossError(f"{loss._label}.per_example {reason}") from error
    scored = {role: scores for role in loss.roles if (scores := batch.role(role)) is not None}
    counts = {role: len(scores) for role, scores in scored.items()}
    # A pair counts once.
    expected = next(iter(counts.values())) if loss.paired else sum(counts.values())
    if loss.grouped:
        expected = len(scored["candidate"].group_sizes or ())
    if not isinstance(values, Tensor) or values.shape != (expected,):
        each = "a pair" if loss.paired else "a group"
        of = (
            each
            if loss.paired or loss.grouped
            else f"a completion ({', '.join(f'{n} {role}' for role, n in counts.items())})"
        )
        raise LossError(
            f"{loss._label}.per_example must return a tensor of shape ({expected},), one value {of}, and returned "
            f"{_described(values)}.{_cure(values, expected)}"
        )
    if not values.is_floating_point():
        raise LossError(
            f"{loss._label}.per_example must return floating-point numbers, and returned {values.dtype}: a comparison "
            "or a count has no gradient"
        )
    if torch.is_grad_enabled() and not values.requires_grad and all(map(_has_gradients, scored.values())):
        raise LossError(
            f"{loss._label}.per_example returns values without a gradient, so nothing would be trained: compute them "
            "from the scores with torch operations, without detach(), no_grad() or comparisons"
        )
    return values


def _has_gradients(scores: Scores) -> bool:
    """Whether everything in the scores that can have a gradient has one."""
    return all(value.requires_grad for name in _WITH_GRADIENT if (value := getattr(scores, name)) is not None)


def _described(values: Any) -> str:
    return f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__


def _cure(values: Any, expected: int) -> str:
    """How to get from the returned values to one per example; "" where that is not known."""
    if isinstance(values, Tensor) and values.shape == (expected, 1):
        return " Remove the last dimension: squeeze(-1)"
    if isinstance(values, Tensor) and values.dim() > 1 and values.shape[0] == expected:
        return " Reduce the further dimensions, for example with sum(-1)"
    return " Leave the mean to the trainer, which takes it over examples, weights and processes"


def _reads_absent(error: Exception, absent: Mapping[str, str]) -> str | None:
    """What a loss read without declaring the need, judging by the function that failed; None for other errors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    read = frame.f_code.co_names
    if isinstance(error, KeyError) and "columns" in read:
        return f"reads the column {error.args[0]!r} without asking for it: write columns = ({error.args[0]!r},)"
    missing = [name for name in absent if name in read]
    if "NoneType" not in str(error) or not missing:
        return None
    asked = ", ".join(dict.fromkeys(absent[name] for name in missing))
    return f"reads {', '.join(missing)} without asking for it, so it is None: add {asked} to `needs`"
