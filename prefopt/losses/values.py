"""The values that a loss's `per_example` returns, checked: a wrong shape would be averaged without an error.

Imports torch and its neighbour `scores`; the needs of losses are in `base`.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prefopt.losses.errors import LossError
from prefopt.losses.scores import PreferenceBatch


def values_of(loss: Any, batch: PreferenceBatch, absent: Mapping[str, str]) -> Tensor:
    """(N,) the loss's values of a batch.

    Args:
        loss: a `Loss`.
        batch: what it is called with.
        absent: fields of `Scores` that are None in the batch, and the need that supplies each.

    Raises:
        ValueError: if the values are not a tensor, are too many or too few, or if the loss reads an absent field.
    """
    try:
        values = loss.per_example(batch)
    except (TypeError, AttributeError, KeyError) as error:
        if (reason := _reads_absent(error, absent)) is None:
            raise
        raise LossError(f"{loss._label}.per_example {reason}") from error
    counts = {role: len(scores) for role in loss.roles if (scores := batch.role(role)) is not None}
    # A pair counts once.
    expected = next(iter(counts.values())) if loss.paired else sum(counts.values())
    if not isinstance(values, Tensor) or values.shape != (expected,):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        of = "a pair" if loss.paired else f"a completion ({', '.join(f'{n} {role}' for role, n in counts.items())})"
        raise LossError(
            f"{loss._label}.per_example must return a tensor of shape ({expected},), one value {of}, and returned "
            f"{found}. Leave the mean to the trainer, which takes it over examples, weights and processes"
        )
    return values


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
