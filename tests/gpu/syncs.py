"""Where a training step makes the host wait for the device, and how often.

On a GPU, PyTorch says so itself (`torch.cuda.set_sync_debug_mode`). On a CPU, calls that would make a GPU wait are
counted where Python makes them; that names the same places, apart from what C++ does on its own.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ASKS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero", "masked_select",
    "unique", "equal", "allclose", "is_nonzero", "bincount", "argwhere",
}  # fmt: skip
"""Functions whose result, or its shape, the host has to wait for."""
PACKAGES = ("prefopt", "trl", "transformers", "accelerate", "peft", "torch")


def place(frames: Any) -> str:
    """The innermost line of a stack that belongs to a package other than torch, as package/file.py:line function."""
    for frame in reversed(list(frames)):
        parts = frame.filename.replace("\\", "/").split("/")
        owner = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] in PACKAGES[:-1]), None)
        if owner is not None:
            return f"{'/'.join(parts[owner:])}:{frame.lineno} {frame.name}"
    return "torch or a test"


class _Asking(TorchFunctionMode):
    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        mask = name == "__getitem__" and _has_mask(arguments[1])
        one = name in ("where", "nonzero") and len(arguments) == 1
        # Lists become tensors on the host, and the copy from memory that is not pinned waits. A tensor that is meant
        # to stay on the host is asked for by the device's name.
        made = function is torch.tensor and _is_data(arguments) and (keywords or {}).get("device") not in (None, "cpu")
        if name in ASKS or mask or one or made:
            self.places[f"{place(traceback.extract_stack()[:-1])} ({'mask' if mask else name})"] += 1
        return function(*arguments, **(keywords or {}))


def _has_mask(index: Any) -> bool:
    found = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in found)


def _is_data(arguments: Any) -> bool:
    return bool(arguments) and isinstance(arguments[0], (list, tuple, int, float, bool))


@contextlib.contextmanager
def counted(device: str) -> Iterator[Counter[str]]:
    """How often each place makes the host wait while this is open."""
    places: Counter[str] = Counter()
    if device == "cpu":
        with _Asking(places):
            yield places
        return
    show = warnings.showwarning

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "synchronizing" not in str(message):
            show(message, category, filename, lineno, *rest)
            return
        places[place(traceback.extract_stack(sys._getframe(1)))] += 1

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
            warnings.showwarning = show
