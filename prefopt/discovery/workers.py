"""Trainings on the toy, in this process or in several; the results come in the order of the candidates either way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import repeat
from types import TracebackType

import torch

from prefopt.discovery.archive import Candidate, Result
from prefopt.discovery.levels import ToyLevel, run_level
from prefopt.discovery.read import read
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Trained:
    """What a candidate scored at a level.

    Attributes:
        number: of the candidate.
        results: one for each beta and seed.
        seconds: of processor time.
    """

    number: int
    results: Sequence[Result]
    seconds: float


@dataclass
class Workers:
    """Processes that train; with a count of 1, this one. They start with the first training.

    Attributes:
        count: of processes.
    """

    count: int = 1
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def train(self, level: ToyLevel, rows: Sequence[Candidate]) -> Iterator[Trained]:
        """Train candidates that have an expression, and yield what each scored, in their order.

        Raises:
            UsageError: if a process ended before its work.
        """
        jobs = [(row.id, row.expression or "") for row in rows]
        if self.count == 1 or not jobs:
            yield from map(_trained, repeat(level), jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_start)
        try:
            yield from self._pool.map(_trained, repeat(level), jobs)
        except BrokenProcessPool:
            raise UsageError(
                "a process that trains ended before its work (out of memory?): repeat the command to continue, with a "
                "smaller --workers if it happens again"
            ) from None


def _trained(level: ToyLevel, job: tuple[int, str]) -> Trained:
    started = time.process_time()
    number, expression = job
    results = run_level(level, read(expression), number)
    return Trained(number, results, time.process_time() - started)


def _start() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes outlive a parent that was killed, unless they watch it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
