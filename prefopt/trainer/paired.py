"""Batches for unlearning: as many rows to retain as rows to forget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from prefopt.losses.scores import FORGET
from prefopt.safety.errors import UsageError


class PairedRows(Sampler[int]):
    """Row numbers, in turns one to forget and one to retain.

    An epoch goes over the rows to forget once, in random order. The rows to retain continue where the last epoch
    stopped, and are shuffled again when all were drawn. The order depends only on the seed and the epoch, so processes
    and resumed runs draw the same rows.

    Args:
        forget: (N,) true for the rows to forget.
        seed: of the order.
    """

    def __init__(self, forget: Any, seed: int) -> None:
        chosen = np.asarray(forget, dtype=bool)
        self._forget, self._retain = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if not len(self._forget) or not len(self._retain):
            missing = "forget (label false)" if not len(self._forget) else "retain (label true)"
            raise UsageError(f"paired_retain draws a row to retain for each row to forget, but no row is to {missing}")
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return 2 * len(self._forget)

    def __iter__(self) -> Iterator[int]:
        forget = self._forget[self._order("forget", self._epoch)]
        for row, other in zip(forget, self._drawn(len(forget)), strict=True):
            yield int(row)
            yield int(other)

    def _drawn(self, count: int) -> Iterator[int]:
        at = self._epoch * count
        lap, place = divmod(at, len(self._retain))
        order = self._order("retain", lap)
        for _ in range(count):
            if place == len(order):
                lap, place = lap + 1, 0
                order = self._order("retain", lap)
            yield self._retain[order[place]]
            place += 1

    def _order(self, what: str, lap: int) -> Any:
        count = len(self._forget if what == "forget" else self._retain)
        return np.random.default_rng([self._seed, int(what == "retain"), lap]).permutation(count)


def paired_rows(rows: Any, args: Any) -> PairedRows | None:
    """The sampler of `paired_retain`; None where the option is off.

    Raises:
        UsageError: if the rows are a stream or do not say which are to be forgotten, or if a batch has an odd size.
    """
    if not getattr(args, "paired_retain", False):
        return None
    if not isinstance(rows, Dataset):
        raise UsageError("paired_retain needs rows that can be drawn in any order, not a stream")
    if args.per_device_train_batch_size % 2:
        raise UsageError(
            "paired_retain fills half of each batch with rows to retain: per_device_train_batch_size must be even, "
            f"got {args.per_device_train_batch_size}"
        )
    if FORGET in rows.column_names:
        forget = [bool(value) for value in rows[FORGET]]
    elif "label" in rows.column_names:
        forget = [not value for value in rows["label"]]
    else:
        raise UsageError(
            f"paired_retain needs a column 'label' (false: to forget) or '{FORGET}'; the data has "
            f"{', '.join(rows.column_names)}"
        )
    return PairedRows(forget, args.data_seed if args.data_seed is not None else args.seed)
