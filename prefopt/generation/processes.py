"""What one process does for all of a run: completions from a server or a file are asked for once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from prefopt.safety.errors import PrefoptError

T = TypeVar("T")


def from_main(items: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items on every process; `items` is called on the main process alone, and the others get what it yields."""
    processes = PartialState()
    if processes.num_processes == 1:
        yield from items()
        return
    source = items() if processes.is_main_process else None
    while True:
        box: list[tuple[T] | None] = [None]
        if source is not None:
            box = [next(((item,) for item in source), None)]
        broadcast_object_list(box)
        if box[0] is None:
            return
        yield box[0][0]


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process; its error is raised on all of them.

    Raises:
        PrefoptError: what `work` raises. Other errors are raised on the main process alone, and end the run.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except PrefoptError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast("T", outcome[0])
